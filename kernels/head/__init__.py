"""The vocabulary head: log-probabilities, entropies and their gradients without whole logits."""

from longtrace.kernels.head.dispatch import linear_cross_entropy, linear_log_prob, linear_weighted_nll
from longtrace.kernels.head.plan import Chunks, plan_chunks
from longtrace.kernels.head.spec import LogProbs

__all__ = ["Chunks", "LogProbs", "linear_cross_entropy", "linear_log_prob", "linear_weighted_nll", "plan_chunks"]
