"""When requests are sent: shapes, stages, users and the run."""
