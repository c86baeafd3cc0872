// The plane that a slide lies on: a Bokeh figure in level-0 pixels, tiles drawn by their own grid, and a camera.
//
// Bokeh's own tile renderer knows web maps: it stretches the narrower tiles of the last column and row to whole ones,
// takes the axes to zoom levels of its own, stops at the slide's own resolution, keeps every tile for ever, and draws
// the pixels that neighbours share twice, which shows where a map is transparent. `TileLayer` keeps its place in the
// figure and its properties, and draws for itself.

const TILE = 254, OVERLAP = 1;
const Models = Bokeh.Models;

/** Tiles of one pyramid: which there are, which are here, which are on their way. */
class Tiles {
  constructor(size, last, url, changed) {
    this.size = size; this.last = last; this.url = url; this.changed = changed;
    this.held = new Map();  // key -> {bitmap, stale}; the first is the longest unused
    this.coming = new Map();  // key -> AbortController
    this.failed = new Map();  // key -> when
    this.limit = 400;
    this.ground = last;  // the finest level that is one tile; it stands in for whatever is not here yet
    while (this.ground > 0 && this.grid(this.ground).some((n) => n > 1)) this.ground -= 1;
    this.stamp = 0;  // of the address; tiles of an older one are shown until theirs has come
  }

  scale(level) { return 2 ** (this.last - level); }

  grid(level) {
    return this.size.map((side) => Math.ceil(Math.ceil(side / this.scale(level)) / TILE));
  }

  get(key) {
    const tile = this.held.get(key);
    if (tile) { this.held.delete(key); this.held.set(key, tile); }
    return tile;
  }

  /** Another address for the same tiles, such as another threshold. */
  readdress(url) { this.url = url; this.stamp += 1; this.abort(() => true); this.failed.clear(); this.stand(); this.changed(); }

  stand() { this.fetch(this.ground, 0, 0); }

  isGround(key) { return key === `${this.ground}/0_0`; }

  abort(which) {
    for (const [key, controller] of this.coming) {
      if (which(key)) { controller.abort(); this.coming.delete(key); }
    }
  }

  async fetch(level, column, row) {
    const key = `${level}/${column}_${row}`, stamp = this.stamp, controller = new AbortController();
    this.coming.set(key, controller);
    try {
      const answer = await fetch(this.url(level, column, row), {signal: controller.signal});
      if (!answer.ok) throw new Error(answer.status);
      const bitmap = await createImageBitmap(await answer.blob());
      if (controller.signal.aborted) { bitmap.close(); return; }
      this.held.get(key)?.bitmap.close();
      this.held.delete(key);
      this.held.set(key, {bitmap, stamp});
      for (const [old, tile] of this.held) {
        if (this.held.size <= this.limit) break;
        if (!this.isGround(old)) { tile.bitmap.close(); this.held.delete(old); }
      }
      this.changed();
    } catch (error) {
      if (!controller.signal.aborted) this.failed.set(key, Date.now());
    } finally {
      if (this.coming.get(key) === controller) this.coming.delete(key);
    }
  }
}

class TileLayerView extends Models.TileRenderer.prototype.default_view {
  connect_signals() {
    super.connect_signals();
    this.model.repaint = () => this.request_paint();
  }

  has_finished() { return true; }

  _paint(ctx) {
    const {tiles, from} = this.model;
    if (!tiles || this.model.alpha <= 0) return;
    const {x_range, y_range} = this.plot_model, {width, left, top, height} = this.plot_view.frame.bbox;
    const x0 = x_range.start, x1 = x_range.end, y0 = y_range.end, y1 = y_range.start;
    const ratio = ctx.getTransform().a, finest = (x1 - x0) / width / ratio;  // level-0 pixels per pixel of the screen
    const level = Math.max(from, Math.min(this.model.to, tiles.last - Math.floor(Math.log2(Math.max(finest * 1.2, 1)))));
    const step = TILE * tiles.scale(level), [columns, rows] = tiles.grid(level);
    const clamp = (value, most) => Math.max(0, Math.min(most, Math.floor(value / step)));
    const visible = [];
    if (x1 > 0 && y1 > 0 && x0 < tiles.size[0] && y0 < tiles.size[1]) {
      for (let row = clamp(y0, rows - 1); row <= clamp(y1, rows - 1); row++) {
        for (let column = clamp(x0, columns - 1); column <= clamp(x1, columns - 1); column++) visible.push([column, row]);
      }
    }
    const far = ([column, row]) => ((column + .5) * step - (x0 + x1) / 2) ** 2 + ((row + .5) * step - (y0 + y1) / 2) ** 2;
    visible.sort((a, b) => far(a) - far(b));

    ctx.save();
    ctx.beginPath();
    ctx.rect(left, top, width, height);
    ctx.clip();
    ctx.globalAlpha = this.model.alpha;
    ctx.imageSmoothingEnabled = finest * 8 > tiles.scale(tiles.last) || !this.model.opaque;
    ctx.imageSmoothingQuality = "medium";
    const wanted = new Set(), missing = [];
    for (const [column, row] of visible) {
      const key = `${level}/${column}_${row}`, tile = tiles.get(key);
      wanted.add(key);
      if (!tile || tile.stamp !== tiles.stamp) missing.push([column, row, key]);
      this._draw(ctx, level, column, row);
    }
    ctx.restore();
    tiles.abort((key) => !wanted.has(key) && !tiles.isGround(key));
    for (const [column, row, key] of missing) {
      if (tiles.coming.size >= 12) break;
      const failed = tiles.failed.get(key);
      if (!tiles.coming.has(key) && !(failed && Date.now() - failed < 5000)) tiles.fetch(level, column, row);
    }
    this.model.waiting = missing.length;
    this.model.drawn = level;
  }

  /** What a tile covers, drawn from it or from the nearest coarser one that is here. */
  _draw(ctx, level, column, row) {
    const {tiles, opaque} = this.model;
    let from = level, c = column, r = row, tile = tiles.get(`${from}/${c}_${r}`);
    while (!tile && from > 0) {
      const finer = tiles.scale(from), coarser = tiles.scale(from - 1), middle = (k) => (k + .5) * TILE * finer / coarser;
      c = Math.floor(middle(c) / TILE); r = Math.floor(middle(r) / TILE); from -= 1;
      tile = tiles.get(`${from}/${c}_${r}`);
    }
    if (!tile) return;
    const scale = tiles.scale(level), theirs = tiles.scale(from), {bitmap} = tile;
    const edge = (k, side) => Math.min(k * TILE * scale, side);
    const [sx0, sx1] = this._screen("x", edge(column, tiles.size[0]), edge(column + 1, tiles.size[0]), ctx);
    const [sy0, sy1] = this._screen("y", edge(row, tiles.size[1]), edge(row + 1, tiles.size[1]), ctx);
    if (sx1 <= sx0 || sy1 <= sy0) return;
    const bx = (c * TILE - (c > 0 ? OVERLAP : 0)) * theirs, by = (r * TILE - (r > 0 ? OVERLAP : 0)) * theirs;
    const [dx0, dx1] = this._screen("x", bx, bx + bitmap.width * theirs);
    const [dy0, dy1] = this._screen("y", by, by + bitmap.height * theirs);
    ctx.save();
    ctx.beginPath();
    ctx.rect(sx0, sy0, sx1 - sx0, sy1 - sy0);  // on whole pixels of the screen, so that nothing is drawn twice or not at all
    ctx.clip();
    ctx.drawImage(bitmap, dx0, dy0, dx1 - dx0, dy1 - dy0);
    ctx.restore();
  }

  /** Where level-0 pixels lie on the canvas; with ``ctx`` on whole pixels of the screen. */
  _screen(axis, low, high, ctx) {
    const scale = axis === "x" ? this.coordinates.x_scale : this.coordinates.y_scale;
    const ends = [scale.compute(low), scale.compute(high)];
    if (!ctx) return ends;
    const m = ctx.getTransform(), [a, e] = axis === "x" ? [m.a, m.e] : [m.d, m.f];
    return ends.map((s) => (Math.round(s * a + e) - e) / a);
  }
}

class TileLayer extends Models.TileRenderer {
  static __name__ = "TileLayer";
  static { this.prototype.default_view = TileLayerView; }
}

/** A figure in ``element`` for a slide of ``size`` level-0 pixels, with a camera. */
export class Plane {
  constructor(element, size, last) {
    this.element = element; this.size = size; this.last = last; this.layers = [];
    this.moved = new Set();
    const range = () => new Models.Range1d({start: 0, end: 1, min_interval: 1e-3});
    this.x = range(); this.y = range();
    this.figure = new Models.Plot({
      x_range: this.x, y_range: this.y, sizing_mode: "stretch_both", toolbar_location: null, min_border: 0,
      outline_line_color: null, background_fill_color: "#ffffff", border_fill_color: null, output_backend: "canvas",
      lod_threshold: null,
    });
    const pan = new Models.PanTool();
    const pinch = new Models.WheelZoomTool({maintain_focus: true, zoom_on_axis: false});
    this.figure.toolbar.tools = [pan, pinch];
    this.figure.toolbar.active_drag = pan;
    this.figure.toolbar.active_scroll = pinch;
  }

  async show() {
    const page = new Bokeh.Document();
    page.add_root(this.figure);
    await Bokeh.embed.add_document_standalone(page, this.element);
    for (const range of [this.x, this.y]) range.change.connect(() => this._changed());
    new ResizeObserver(() => this._resized()).observe(this.element);
    this.element.addEventListener("wheel", (event) => this._wheel(event), {capture: true, passive: false});
    this.element.addEventListener("pointerdown", () => this.halt(), {capture: true});
    this.element.addEventListener("dblclick", (event) => this.zoom(event.shiftKey ? .5 : 2, this._at(event)));
    this.fit(false);
  }

  /** Tiles of the whole plane; ``from`` and ``to`` are the levels that are asked for. */
  add(url, {opaque = true, alpha = 1, from = 0, to = this.last} = {}) {
    const layer = new TileLayer({tile_source: new Models.WMTSTileSource({url: ""}), alpha, level: "image"});
    layer.opaque = opaque; layer.from = from; layer.to = to; layer.waiting = 1;
    layer.tiles = new Tiles(this.size, this.last, url, () => layer.repaint?.());
    layer.tiles.stand();
    this.layers.push(layer);
    this.figure.renderers = [...this.figure.renderers, layer];
    return layer;
  }

  get frame() {
    const {width, height} = this.element.getBoundingClientRect();
    return [Math.max(width, 1), Math.max(height, 1)];
  }

  /** Centre in level-0 pixels, and how many a pixel of the page is wide. */
  get camera() {
    return {
      x: (this.x.start + this.x.end) / 2, y: (this.y.start + this.y.end) / 2,
      scale: (this.x.end - this.x.start) / this.frame[0],
    };
  }

  set camera({x, y, scale}) {
    const [width, height] = this.frame, held = this._held({x, y, scale});
    this._setting = true;
    this.x.setv({start: held.x - width / 2 * held.scale, end: held.x + width / 2 * held.scale});
    this.y.setv({start: held.y + height / 2 * held.scale, end: held.y - height / 2 * held.scale});
    this._setting = false;
    this._last = held;
    for (const tell of this.moved) tell(held);
  }

  get widest() { return this.whole * 2; }

  /** The slide stays in sight, and its pixels below an eighth of an inch. */
  _held({x, y, scale}) {
    return {
      x: Math.max(0, Math.min(this.size[0], x)), y: Math.max(0, Math.min(this.size[1], y)),
      scale: Math.max(1 / 16, Math.min(this.widest, scale)),
    };
  }

  _changed() {  // by Bokeh's own tools
    if (this._setting || this._queued) return;
    this._queued = true;
    requestAnimationFrame(() => { this._queued = false; this.camera = this.camera; });
  }

  _resized() { if (this._last) { this.halt(); this.camera = this._last; } }

  _at(event) {
    const box = this.element.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  /** Where a place of the element lies on the slide. */
  under([px, py]) {
    const [width, height] = this.frame, {x, y, scale} = this.camera;
    return [x + (px - width / 2) * scale, y + (py - height / 2) * scale];
  }

  _wheel(event) {
    event.preventDefault();
    event.stopImmediatePropagation();
    const lines = event.deltaMode === 1 ? 33 : event.deltaMode === 2 ? 300 : 1;
    const delta = Math.max(-240, Math.min(240, event.deltaY * lines));
    this.zoom(2 ** (-delta / (event.ctrlKey ? 60 : 240)), this._at(event));
  }

  halt() { this._run = null; this._aim = null; }

  _animate(frame) {
    const run = this._run = {}, begun = performance.now();
    const next = (now) => {
      if (this._run !== run) return;
      if (frame(Math.max(0, now - begun))) requestAnimationFrame(next); else this.halt();
    };
    requestAnimationFrame(next);
  }

  /** Zoom in by ``factor``, smoothly; what lies under ``at`` stays there. Steps that come quickly add up. */
  zoom(factor, at = this.frame.map((side) => side / 2)) {
    const [width, height] = this.frame, [px, py] = [at[0] - width / 2, at[1] - height / 2];
    const aim = Math.max(1 / 16, Math.min(this.widest, (this._aim ?? this.camera.scale) / factor));
    const start = this.camera, [fx, fy] = this.under(at);
    this._animate((ms) => {
      const t = 1 - Math.exp(-ms / 70), scale = start.scale * (aim / start.scale) ** (t > .995 ? 1 : t);
      this.camera = {x: fx - px * scale, y: fy - py * scale, scale};
      return t <= .995;
    });
    this._aim = aim;
  }

  /** Move by shares of what is in sight. */
  pan(across, down) {
    const [width, height] = this.frame, {x, y, scale} = this.camera;
    this.fly({x: x + across * width * scale, y: y + down * height * scale, scale}, 160);
  }

  /** What a pixel of the page is wide where the whole slide is in sight. */
  get whole() {
    const [width, height] = this.frame;
    return Math.max(this.size[0] / width, this.size[1] / height) * 1.04;
  }

  fit(smooth = true) {
    const all = {x: this.size[0] / 2, y: this.size[1] / 2, scale: this.whole};
    if (smooth) this.fly(all); else this.camera = all;
  }

  /** Fly to a box of level-0 pixels and leave some room around it. */
  frameBox([x0, y0, x1, y1], room = 1.8) {
    const [width, height] = this.frame;
    const scale = Math.min(this.whole, Math.max((x1 - x0) / width, (y1 - y0) / height, .25) * room);
    this.fly({x: (x0 + x1) / 2, y: (y0 + y1) / 2, scale});
  }

  /** The path that zooms out and in again so that what is seen moves evenly (van Wijk and Nuij, 2003). */
  fly(to, most = 1400) {
    this.halt();
    const from = this.camera, goal = this._held(to), [width] = this.frame, rho = 1.3;
    const w0 = from.scale * width, w1 = goal.scale * width, dx = goal.x - from.x, dy = goal.y - from.y;
    const d2 = dx * dx + dy * dy, d = Math.sqrt(d2);
    let length, place;
    if (d < 1e-6 * w0) {
      length = Math.abs(Math.log(w1 / w0)) / rho;
      place = (s) => [0, w0 * Math.exp(Math.sign(w1 - w0) * rho * s)];
    } else {
      const b = (w, sign) => (w1 * w1 - w0 * w0 + sign * rho ** 4 * d2) / (2 * w * rho * rho * d);
      const r = (value) => Math.log(Math.sqrt(value * value + 1) - value);
      const r0 = r(b(w0, 1)), r1 = r(b(w1, -1));
      length = (r1 - r0) / rho;
      place = (s) => {
        const u = w0 / (rho * rho * d) * (Math.cosh(r0) * Math.tanh(rho * s + r0) - Math.sinh(r0));
        return [u, w0 * Math.cosh(r0) / Math.cosh(rho * s + r0)];
      };
    }
    const time = Math.min(most, 250 + 450 * length);
    this._animate((ms) => {
      const t = Math.min(1, ms / time), eased = t * t * (3 - 2 * t), [u, w] = place(eased * length);
      this.camera = t === 1 ? goal : {x: from.x + u * dx, y: from.y + u * dy, scale: w / width};
      return t < 1;
    });
  }
}
