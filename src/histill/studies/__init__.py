"""Studies: plain functions that run recipes one after another and compare the runs; one file per paper."""
