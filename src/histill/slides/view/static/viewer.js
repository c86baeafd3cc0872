// The controls around the plane: layers and their sliders, lesions, scale bar, overview, keys.

const $ = (id) => document.getElementById(id);
const part = encodeURIComponent;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && name !== "list") element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const css = ([r, g, b], alpha = 1) => `rgb(${r} ${g} ${b} / ${alpha})`;

async function json(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
  return answer.json();
}

/** A round number of at most ``most``: 1, 2 or 5 times a power of ten. */
export function round(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return [5, 2, 1].map((step) => step * power).find((value) => value <= most) ?? power;
}

export function microns(value) {
  return value >= 1000 ? `${+(value / 1000).toPrecision(3)} mm` : `${+value.toPrecision(3)} µm`;
}

function area(squareMicrons) {
  return squareMicrons >= 1e5 ? `${(squareMicrons / 1e6).toPrecision(3)} mm²` : `${Math.round(squareMicrons)} µm²`;
}

// What the outlines say ---------------------------------------------------------------------------------------------

function ringArea(ring) {
  let twice = 0;
  for (let n = 0; n + 1 < ring.length; n++) twice += ring[n][0] * ring[n + 1][1] - ring[n + 1][0] * ring[n][1];
  return Math.abs(twice) / 2;
}

function lesionsOf(collection) {
  const found = [];
  for (const feature of collection.features ?? []) {
    const {type, coordinates} = feature.geometry ?? {};
    const polygons = type === "Polygon" ? [coordinates] : type === "MultiPolygon" ? coordinates : [];
    const points = polygons.flatMap((rings) => rings[0] ?? []);
    if (!points.length) continue;
    let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
    for (const [x, y] of points) { x0 = Math.min(x0, x); y0 = Math.min(y0, y); x1 = Math.max(x1, x); y1 = Math.max(y1, y); }
    const {classification, measurements, name} = feature.properties ?? {};
    const pixels = polygons.reduce((sum, [outer, ...holes]) =>
      sum + ringArea(outer) - holes.reduce((less, hole) => less + ringArea(hole), 0), 0);
    found.push({
      polygons, pixels, box: [x0, y0, x1, y1], label: classification?.name ?? "", name: name ?? "",
      color: classification?.color ?? [200, 200, 200], measurements: measurements ?? {},
    });
  }
  return found.sort((a, b) => b.pixels - a.pixels);
}

/** The probability among a lesion's measurements, if there is one: the mean before any other. */
function probability({measurements, label}) {
  const names = Object.keys(measurements).filter((name) => /prob/i.test(name) && measurements[name] >= 0 && measurements[name] <= 1);
  const best = names.find((name) => /mean/i.test(name) && name.includes(label)) ?? names.find((name) => /mean/i.test(name)) ?? names[0];
  return best === undefined ? undefined : measurements[best];
}

class Page {
  constructor(Plane, slide, lesions) {
    this.slide = slide; this.lesions = lesions; this.shown = new Set(); this.chosen = -1;
    this.threshold = slide.threshold; this.doubt = .2; this.opacity = .45;
    this.plane = new Plane($("plane"), [slide.width, slide.height], slide.levels - 1);
  }

  tileUrl(level, column, row) {
    return `/slides/${part(this.slide.name)}/${level}/${column}_${row}.jpeg?v=${this.slide.version}`;
  }

  /** From which value on a layer is shown: a probability, or a difference of two. */
  from(layer) { return layer.of_probability ? this.threshold : this.doubt; }

  overlayUrl(layer) {
    const threshold = this.from(layer).toFixed(2);
    return (level, column, row) =>
      `/overlays/${part(this.slide.name)}/${part(layer.name)}/${level}/${column}_${row}.png?threshold=${threshold}&v=${this.slide.version}`;
  }

  async start() {
    this.ground = this.plane.add((...place) => this.tileUrl(...place));
    await this.plane.show();
    for (const layer of this.slide.layers) if (layer.shown) this.shown.add(layer);
    this.layerControls();
    this.lesionControls();
    this.sliders();
    this.keys();
    this.overview();
    this.plane.moved.add((camera) => this.furniture(camera));
    this.furniture(this.plane.camera);
    for (const layer of this.slide.layers) this.apply(layer);
    document.documentElement.dataset.ready = "yes";
  }

  // Layers --------------------------------------------------------------------------------------------------------

  layerControls() {
    const groups = Map.groupBy ? Map.groupBy(this.slide.layers, (layer) => layer.group) : this.slide.layers.reduce(
      (map, layer) => map.set(layer.group, [...(map.get(layer.group) ?? []), layer]), new Map());
    for (const [group, layers] of groups) {
      // Those of one model are open; those of another wait until they are asked for.
      const open = layers.length === 1 || layers.some((layer) => layer.shown);
      const box = make("details", {open}, make("summary", {textContent: group}));
      for (const layer of layers) {
        const input = make("input", {type: "checkbox", checked: this.shown.has(layer)});
        input.dataset.layer = layer.name;
        input.addEventListener("change", () => {
          if (input.checked) this.shown.add(layer); else this.shown.delete(layer);
          this.apply(layer);
        });
        layer.input = input;
        const chip = make("span", {className: "chip"});
        chip.style.background = css(layer.color);
        box.append(make("label", {className: "check"}, input, chip, make("span", {textContent: layer.title})));
      }
      $("layers").append(box);
    }
    $("maps").hidden = this.slide.layers.length === 0;
  }

  apply(layer) {
    const shown = this.shown.has(layer);
    if (shown && !layer.tiles) {
      const last = this.slide.levels - 1;
      const to = Math.max(0, Math.min(last, last - Math.floor(Math.log2(Math.max(1, layer.pixel / 2)))));
      layer.tiles = this.plane.add(this.overlayUrl(layer), {opaque: false, to});
      layer.threshold = this.from(layer);
      this.plane.figure.renderers = [  // outlines stay on top
        ...this.plane.figure.renderers.filter((one) => one !== this.outlines), ...(this.outlines ? [this.outlines] : [])];
    }
    if (!layer.tiles) return;
    layer.tiles.alpha = this.opacity;
    layer.tiles.visible = shown;
    if (shown && layer.threshold !== this.from(layer)) {
      layer.threshold = this.from(layer);
      layer.tiles.tiles.readdress(this.overlayUrl(layer));
    }
  }

  sliders() {
    let waiting;
    const all = () => { for (const layer of this.slide.layers) this.apply(layer); };
    const slider = (id, name, say, pause) => {
      const input = $(id), show = () => { $(`${id}-value`).textContent = say(this[name]); };
      input.value = this[name] * 100;
      input.addEventListener("input", () => {
        this[name] = input.value / 100;
        show();
        clearTimeout(waiting);
        if (pause) waiting = setTimeout(all, pause); else all();
      });
      show();
    };
    slider("opacity", "opacity", (value) => `${Math.round(value * 100)} %`, 0);
    slider("threshold", "threshold", (value) => `p ≥ ${value.toFixed(2)}`, 60);
    slider("doubt", "doubt", (value) => `≥ ${value.toFixed(2)}`, 60);
    $("doubt").parentElement.hidden = !this.slide.layers.some((layer) => !layer.of_probability);
  }

  // Lesions -------------------------------------------------------------------------------------------------------

  lesionControls() {
    $("findings").hidden = !this.slide.lesions;
    if (!this.slide.lesions) return;
    $("lesion-count").textContent = this.lesions.length;
    const list = $("lesion-list"), mpp = this.slide.mpp;
    if (!this.lesions.length) list.append(make("li", {className: "none", textContent: "none found"}));
    this.lesions.slice(0, 500).forEach((lesion, n) => {
      const chip = make("span", {className: "chip ring"});
      chip.style.borderColor = css(lesion.color);
      const likely = probability(lesion);
      const size = mpp ? area(lesion.pixels * mpp * mpp) : `${Math.round(lesion.pixels)} px²`;
      const button = make("button", {type: "button"}, chip,
        make("span", {className: "what", textContent: lesion.name || lesion.label || `lesion ${n + 1}`}),
        make("span", {className: "figure", textContent: likely === undefined ? size : `${size} · p ${likely.toFixed(2)}`}));
      button.addEventListener("click", () => this.choose(n));
      lesion.item = make("li", {}, button);
      list.append(lesion.item);
    });
    if (this.lesions.length > 500) list.append(make("li", {className: "none", textContent: `and ${this.lesions.length - 500} smaller`}));
    const {Models} = Bokeh;
    const data = {
      xs: this.lesions.map(({polygons}) => polygons.map((rings) => rings.map((ring) => ring.map(([x]) => x)))),
      ys: this.lesions.map(({polygons}) => polygons.map((rings) => rings.map((ring) => ring.map(([, y]) => y)))),
      line: this.lesions.map(({color}) => css(color)), width: this.lesions.map(() => 2),
    };
    const source = this.outlineSource = new Models.ColumnDataSource({data});
    const glyph = (line_color, line_width) => new Models.MultiPolygons({
      xs: {field: "xs"}, ys: {field: "ys"}, fill_color: null, line_color, line_width, line_join: "round"});
    this.outlines = new Models.GlyphRenderer({data_source: source, glyph: glyph({field: "line"}, {field: "width"})});
    this.plane.figure.renderers = [...this.plane.figure.renderers, this.outlines];
    $("show-lesions").addEventListener("change", (event) => { this.outlines.visible = event.target.checked; });
  }

  choose(n) {
    if (!this.lesions.length) return;
    n = (n + this.lesions.length) % this.lesions.length;
    this.lesions[this.chosen]?.item?.classList.remove("chosen");
    this.chosen = n;
    const lesion = this.lesions[n];
    lesion.item?.classList.add("chosen");
    lesion.item?.scrollIntoView({block: "nearest"});
    this.outlineSource.data = {...this.outlineSource.data, width: this.lesions.map((_, k) => k === n ? 4 : 2)};
    this.plane.frameBox(lesion.box);
  }

  // Furniture -----------------------------------------------------------------------------------------------------

  furniture(camera) {
    const {mpp} = this.slide, unit = mpp ?? 1;
    const length = round(150 * camera.scale * unit);
    $("scale-bar").style.width = `${length / unit / camera.scale}px`;
    $("scale-label").textContent = mpp ? microns(length) : `${length} px`;
    const perPixel = camera.scale * unit;
    $("zoom-label").textContent = mpp
      ? `${+(10 / perPixel).toPrecision(2)}× · ${+perPixel.toPrecision(2)} µm/px` : `${+(100 / camera.scale).toPrecision(2)} %`;
    const [width, height] = this.plane.frame, box = $("here"), map = $("overview-picture");
    const ratio = map.clientWidth / this.slide.width || 0;
    const clamp = (value, most) => Math.max(0, Math.min(most, value));
    const left = clamp((camera.x - width / 2 * camera.scale) * ratio, map.clientWidth);
    const right = clamp((camera.x + width / 2 * camera.scale) * ratio, map.clientWidth);
    const top = clamp((camera.y - height / 2 * camera.scale) * ratio, map.clientHeight);
    const bottom = clamp((camera.y + height / 2 * camera.scale) * ratio, map.clientHeight);
    Object.assign(box.style, {
      left: `${left}px`, top: `${top}px`, width: `${Math.max(right - left, 3)}px`, height: `${Math.max(bottom - top, 3)}px`});
  }

  overview() {
    const map = $("overview-picture");
    map.src = `/slides/${part(this.slide.name)}/thumbnail.jpeg?v=${this.slide.version}`;
    map.addEventListener("load", () => this.furniture(this.plane.camera));
    const go = (event) => {
      const box = map.getBoundingClientRect();
      this.plane.halt();
      this.plane.camera = {
        x: (event.clientX - box.left) / box.width * this.slide.width,
        y: (event.clientY - box.top) / box.height * this.slide.height, scale: this.plane.camera.scale};
    };
    $("overview").addEventListener("pointerdown", (event) => {
      event.preventDefault();
      $("overview").setPointerCapture(event.pointerId);
      go(event);
    });
    $("overview").addEventListener("pointermove", (event) => { if (event.buttons) go(event); });
  }

  keys() {
    const plane = this.plane;
    const does = {
      "+": () => plane.zoom(2), "=": () => plane.zoom(2), "-": () => plane.zoom(.5), "0": () => plane.fit(),
      ArrowLeft: () => plane.pan(-.25, 0), ArrowRight: () => plane.pan(.25, 0),
      ArrowUp: () => plane.pan(0, -.25), ArrowDown: () => plane.pan(0, .25),
      n: () => this.choose(this.chosen + 1), p: () => this.choose(this.chosen < 0 ? -1 : this.chosen - 1),
      l: () => $("show-lesions").click(), o: () => this.toggleAll(),
    };
    addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const slider = event.target instanceof HTMLInputElement && event.target.type === "range";
      if (!does[event.key] || (slider && event.key.startsWith("Arrow"))) return;
      event.preventDefault();
      does[event.key]();
    });
    $("zoom-in").addEventListener("click", () => plane.zoom(2));
    $("zoom-out").addEventListener("click", () => plane.zoom(.5));
    $("zoom-fit").addEventListener("click", () => plane.fit());
    $("fold").addEventListener("click", () => document.body.classList.toggle("folded"));
  }

  /** All maps off, or those that were on again: to see the tissue underneath. */
  toggleAll() {
    if (this.shown.size) { this.before = [...this.shown]; this.shown.clear(); }
    else for (const layer of this.before ?? []) this.shown.add(layer);
    for (const layer of this.slide.layers) { layer.input.checked = this.shown.has(layer); this.apply(layer); }
  }
}

async function start() {
  if (location.search.includes("token=")) history.replaceState(null, "", location.pathname);  // it is a cookie now
  const name = document.body.dataset.slide;
  if (!name) return;
  try {
    const {Plane} = await import("./plane.js");
    const slide = await json(`/slides/${part(name)}/slide.json`);
    const url = `/slides/${part(name)}/lesions.geojson?v=${slide.version}`;
    const page = new Page(Plane, slide, slide.lesions ? lesionsOf(await json(url)) : []);
    window.histill = page;
    await page.start();
  } catch (error) {
    $("problem").textContent = `The slide cannot be shown: ${error.message}`;
    $("problem").hidden = false;
    throw error;
  }
}

start();
