"""What was measured: records, statistics, and the files and tables that show them."""
