"""The engine in a process of its own: data-only messages over a private ZeroMQ socket, supervised and restarted.

``client.EngineClient`` is the door: it offers what ``caesura.runtime.api.Service`` asks for, and loads no torch.
"""
