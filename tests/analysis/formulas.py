"""Every metric of a comparison written out in NumPy, from the definitions alone."""

from __future__ import annotations

import numpy as np
from scipy import stats


def metrics(R: np.ndarray, B: np.ndarray, damping: float, g: np.ndarray) -> dict[str, float]:
    size = len(R)
    fro = np.linalg.norm
    found = {}
    found["error"] = fro(R - B) / fro(R)
    best = np.sum(R * B) / np.sum(B * B)
    found["scale"] = best
    found["error_rescaled"] = fro(R - best * B) / fro(R)
    found["cosine"] = np.sum(R * B) / (fro(R) * fro(B))
    found["spectral_error"] = fro(R - B, 2) / fro(R, 2)
    found["trace_ratio"] = np.trace(B) / np.trace(R)
    found["diagonal_correlation"] = np.corrcoef(np.diag(R), np.diag(B))[0, 1]
    found["diagonal_rank_correlation"] = stats.spearmanr(np.diag(R), np.diag(B)).statistic

    r, U = np.linalg.eigh(R)
    b, V = np.linalg.eigh(B)
    k = min(10, max(1, size - 1))
    U = U[:, np.argsort(-np.abs(r))[:k]]
    V = V[:, np.argsort(-np.abs(b))[:k]]
    angles = np.linalg.svd(U.T @ V, compute_uv=False)
    found["eigenspace_overlap"] = np.mean(angles**2)
    found["eigenspace_k"] = k

    Rd, Bd = R + damping * np.eye(size), B + damping * np.eye(size)
    found["condition_number"] = np.linalg.cond(Bd)
    found["reference_condition_number"] = np.linalg.cond(Rd)
    found["spectrum_distance"] = fro(np.sort(r) - np.sort(b)) / fro(r)
    found["spectrum_wasserstein"] = stats.wasserstein_distance(r, b) / np.mean(np.abs(r))

    ours, theirs = -np.linalg.solve(Rd, g), -np.linalg.solve(Bd, g)
    cosine = ours @ theirs / (fro(ours) * fro(theirs))
    found["step_angle"] = np.degrees(np.arccos(np.clip(cosine, -1, 1)))

    def decrease(matrix: np.ndarray, step: np.ndarray) -> float:
        return -(g @ step + step @ matrix @ step / 2)

    found["predicted_decrease"] = decrease(Bd, theirs)
    found["actual_decrease"] = decrease(Rd, theirs)
    found["decrease_ratio"] = decrease(Rd, theirs) / decrease(Bd, theirs)
    found["step_efficiency"] = decrease(Rd, theirs) / decrease(Rd, ours)

    product = Rd @ np.linalg.inv(Bd)
    found["stein_divergence"] = np.trace(product) - np.linalg.slogdet(product)[1] - size
    return found


def rearranged(R: np.ndarray, out: int, inp: int) -> np.ndarray:
    """Van Loan and Pitsianis' rearrangement of a matrix in the view ``[out, inp]``."""
    return R.reshape(out, inp, out, inp).transpose(0, 2, 1, 3).reshape(out * out, inp * inp)


def gap_kronecker(R: np.ndarray, out: int, inp: int) -> float:
    """Squared distance of the nearest Kronecker product, by singular values."""
    return float(np.sum(np.linalg.svd(rearranged(R, out, inp), compute_uv=False)[1:] ** 2))


def gap_diagonal_kronecker(R: np.ndarray, out: int, inp: int) -> float:
    values = np.linalg.svd(np.diag(R).reshape(out, inp), compute_uv=False)
    return float(np.sum(R**2) - values[0] ** 2)


def gap_diagonal(R: np.ndarray) -> float:
    return float(np.sum(R**2) - np.sum(np.diag(R) ** 2))


def gap_identity(R: np.ndarray) -> float:
    return float(np.sum(R**2) - np.trace(R) ** 2 / len(R))
