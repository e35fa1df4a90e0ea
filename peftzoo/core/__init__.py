"""The plumbing between peft and the methods: contract, registry, resources; knows no method."""
