"""Scripts of those who make this project: kernels' times, comparisons with other compressors, model shapes."""
