"""Makes a small model learn what a large one puts out: teachers, students, and codes that the student lives with."""
