"""What the embedded model can do: for each skill, tasks with a teacher that solves them by calling the real tools."""

from __future__ import annotations

from caesura.runtime.embedded.skills.mixture import SKILLS, held_out_task
from caesura.runtime.embedded.skills.task import Call, Task, Teacher
from caesura.runtime.embedded.skills.world import World

__all__ = ["SKILLS", "Call", "Task", "Teacher", "World", "held_out_task"]
