"""Methods side by side over a data set: records, statistics, and one page that shows them."""
