"""A run or a comparison as a page of HTML, as CSV, and as JUnit XML."""
