"""Training. Called, as `flame.train(recipe)`, it trains in this process: `flame.api.train`."""
