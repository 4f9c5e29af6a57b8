"""Group-relative advantages."""

from longtrace.kernels.advantages.dispatch import Advantages, GroupCounts, group_advantages

__all__ = ["Advantages", "GroupCounts", "group_advantages"]
