"""``pareto study``: a plan in, every measurement that it names, and a page with its verdicts out."""
