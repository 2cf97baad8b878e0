"""The verb `watch`: a terminal view of runs, which only reads their files."""
