"""One local page that follows a run, its seeds, or a folder of runs, from what they write into their directories."""
