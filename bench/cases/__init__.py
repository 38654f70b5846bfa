"""One module a topic; every module in here is imported and its benchmarks are run."""
