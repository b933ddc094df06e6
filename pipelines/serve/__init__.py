"""One model for many users: a queue before the predictor, an HTTP API and a web page."""
