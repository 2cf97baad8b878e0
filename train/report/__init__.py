"""Make the report of one run or several: page and plots."""
