"""Measuring: speed, memory, quality of sdengine and its peers. The product never imports it."""
