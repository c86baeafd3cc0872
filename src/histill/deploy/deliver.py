"""The student as others get it: exported, checked against its run, quantised, and timed beside its teacher."""
