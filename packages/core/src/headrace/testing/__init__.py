"""What adapters and benchmarks test themselves with: engines without a model, tiny models, conformance suites."""
