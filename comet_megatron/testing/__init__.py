"""Helpers of the tests: tiny models and data, functions run on several gloo processes."""
