"""Engines that sdengine is measured against, each in a process and an environment of its own."""
