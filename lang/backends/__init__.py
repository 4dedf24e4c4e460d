"""Backends: the in-process engine, and a scripted one for tests."""
