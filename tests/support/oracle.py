"""Independent definitions in numpy and float64, written from the formulas and not from the library's code."""

import numpy as np


def philox4x32(counter: np.ndarray, key: np.ndarray, rounds: int = 10) -> np.ndarray:
    """counter (N, 4), key (N, 2), uint32 -> (N, 4) uint32 (Salmon et al. 2011), in Python-sized integers."""
    c = [counter[:, i].astype(object) for i in range(4)]
    k = [key[:, i].astype(object) for i in range(2)]
    for _ in range(rounds):
        product0, product1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [product1 // 2**32 ^ c[1] ^ k[0], product1 % 2**32, product0 // 2**32 ^ c[3] ^ k[1], product0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack([x.astype(np.uint64) for x in c], axis=1).astype(np.uint32)


def words(elements: np.ndarray, seed: int, step: int, stream: int) -> np.ndarray:
    """The word of each element: elements (N,) of any integers -> (N,) uint32."""
    k = [int(e) for e in elements]
    counter = np.array(
        [[q & 0xFFFFFFFF, q >> 32, step & 0xFFFFFFFF, stream + 256 * (step >> 32)] for q in (e // 4 for e in k)],
        dtype=np.uint32,
    ).reshape(-1, 4)
    seed %= 1 << 64
    key = np.tile(np.array([[seed & 0xFFFFFFFF, seed >> 32]], dtype=np.uint32), (len(k), 1))
    lanes = philox4x32(counter, key)
    return lanes, np.array([e % 4 for e in k], dtype=int)


def normals(elements: np.ndarray, seed: int, step: int, stream: int = 0) -> np.ndarray:
    """(N,) float64 normals of the elements, from float32-rounded uniforms."""
    lanes, which = words(elements, seed, step, stream)
    even, odd = lanes[:, 0::2], lanes[:, 1::2]
    u = ((even.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float64)
    theta = odd.astype(np.int32).astype(np.float64) * (2 * np.pi / 2**32)
    rho = np.sqrt(-2 * np.log(u))
    both = np.stack([rho[:, 0] * np.cos(theta[:, 0]), rho[:, 0] * np.sin(theta[:, 0]),
                     rho[:, 1] * np.cos(theta[:, 1]), rho[:, 1] * np.sin(theta[:, 1])], axis=1)  # fmt: skip
    return both[np.arange(len(which)), which]


def gain(score, threshold, norm="element"):
    """(gamma, gamma * score), both of the score's shape, in float64 numpy.

    Where infinite scores share a norm, they are equally large and the finite ones beside them vanish.
    """
    s = np.asarray(score, dtype=np.float64)
    axes = {"element": (), "channel": (1,), "chain": tuple(range(1, s.ndim))}[norm]
    with np.errstate(invalid="ignore"):
        infinite = np.isinf(s).any(axes, keepdims=True) & ~np.isnan(s).any(axes, keepdims=True)
        equal = np.where(infinite, np.where(np.isinf(s), np.sign(s), 0.0), s)
        length = np.sqrt((equal**2).sum(axes, keepdims=True))
        size = np.broadcast_to(np.where(infinite, np.inf, length), s.shape)
        gamma = np.where(np.isnan(size), np.nan, 1 / np.maximum(1, size / threshold))
        drift = np.where(infinite & np.isfinite(threshold), threshold * equal / length, gamma * s)
    return gamma, drift


def statistics(score, threshold, norm="element", gamma=None):
    """(mean gamma, RMS score, fraction of gamma below 1) of each chain in float64 numpy: (B,) each."""
    s = np.asarray(score, dtype=np.float64)
    g = gain(s, threshold, norm)[0] if gamma is None else np.broadcast_to(np.asarray(gamma, dtype=np.float64), s.shape)
    g, flat = g.reshape(len(s), -1), s.reshape(len(s), -1)
    with np.errstate(invalid="ignore"):
        return g.mean(1), np.sqrt((flat**2).mean(1)), (g < 1).mean(1)


def step(
    z, score, threshold, xi, *, step_size=1.0, noise_scale=1.0, norm="element", gamma=None, mask=None, bounds=None
):
    """One transition in float64 numpy: z, score, xi of one shape (B, ...)."""
    z, s, xi = (np.asarray(a, dtype=np.float64) for a in (z, score, xi))
    with np.errstate(invalid="ignore"):
        if gamma is None:
            g, drift = gain(s, threshold, norm)
        else:
            g = np.asarray(gamma, dtype=np.float64)
            drift = g * s
        out = z + step_size / 2 * drift + noise_scale * np.sqrt(step_size * g) * xi
        if bounds is not None:
            out = np.clip(out, *bounds)
    return out if mask is None else np.where(np.broadcast_to(mask, z.shape), out, z)


def uniforms(elements: np.ndarray, seed: int, step: int, stream: int) -> np.ndarray:
    """(N,) float64 uniforms on (0, 1] of the elements, as float32 has them."""
    lanes, which = words(elements, seed, step, stream)
    chosen = lanes[np.arange(len(which)), which].astype(np.float32)
    return ((chosen + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float64)


def log_accept(
    z, score, energy, proposal, proposal_score, proposal_energy, threshold, *, step_size=1.0, norm="element", mask=None
):
    """log of the Metropolis-Hastings ratio of each chain in float64 numpy, (B,): of the two densities as they stand."""
    z, score, energy, proposal, proposal_score, proposal_energy = (
        np.asarray(a, dtype=np.float64) for a in (z, score, energy, proposal, proposal_score, proposal_energy)
    )
    moves = np.ones(z.shape, dtype=bool) if mask is None else np.broadcast_to(mask, z.shape)

    def log_density(y, x, score_at_x):
        gamma, drift = gain(score_at_x, threshold, norm)
        variance = step_size * gamma
        terms = -((y - x - step_size / 2 * drift) ** 2) / (2 * variance) - np.log(variance) / 2
        return np.where(moves, terms, 0.0).reshape(len(z), -1).sum(1)

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return energy - proposal_energy + (log_density(z, proposal, proposal_score) - log_density(proposal, z, score))


def leapfrog(z, momentum, score_of, step_size, steps, mask=None):
    """(z, momentum) after ``steps`` leapfrog steps of length sqrt(step_size) with unit mass, in float64 numpy: kicks by
    half steps of the score, drifts by whole ones; elements outside ``mask`` are held."""
    z, p = np.asarray(z, dtype=np.float64), np.asarray(momentum, dtype=np.float64)
    moves = np.ones(z.shape) if mask is None else np.broadcast_to(mask, z.shape).astype(np.float64)
    length, p = np.sqrt(step_size), p * moves
    for _ in range(steps):
        half = p + length / 2 * moves * score_of(z)
        z = z + length * half
        p = half + length / 2 * moves * score_of(z)
    return z, p


def dual_averaging(acceptances, target, step_size, *, shrinkage=0.05, delay=10, decay=0.75):
    """Hoffman and Gelman (2014), algorithm 5, of h = sqrt(step_size): (step sizes tried, the step size to keep)."""
    mu, h_bar = np.log(10 * np.sqrt(step_size)), 0.0
    log_eps, log_eps_bar = np.log(np.sqrt(step_size)), 0.0
    tried = []
    for m, alpha in enumerate(acceptances, start=1):
        tried.append(np.exp(log_eps) ** 2)
        h_bar = (1 - 1 / (m + delay)) * h_bar + (target - alpha) / (m + delay)
        log_eps = mu - np.sqrt(m) / shrinkage * h_bar
        eta = m**-decay
        log_eps_bar = eta * log_eps + (1 - eta) * log_eps_bar
    return np.array(tried), np.exp(log_eps_bar) ** 2
