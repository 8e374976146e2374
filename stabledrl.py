"""StableDRL in one file: reinforcement learning for diffusion language models, where GRPO
collapses.

Source: Zhong et al., Stabilizing Reinforcement Learning for Diffusion Language Models, arXiv
2603.06743. The paper reasons about noise in estimates of the likelihood. The toy tasks here are so
small that the exact likelihood can be computed: the noise is measured, and can be taken away.

What a diffusion language model is. A GPT predicts the next token from those before it. A diffusion
language model predicts *hidden* tokens from visible ones: it learns to fill in blanks, and it
writes by starting from blanks and filling them in, one by one, in random order. A *block*-diffusion
model writes block after block of B tokens, left to right; only within a block is the order free.
With B = 1 it factorises like a GPT.

How rewards train it. The model is a *policy* π_θ with weights θ. It answers each prompt G times;
these *completions* are a *group*. A judge gives each a reward; its *advantage* A says how much
better it did than its group. Gradient ascent on Σ A·log π_θ(completion) makes the better ones
likelier. That is right for the policy that wrote them, called "old"; after one step the policy is
another. To use completions for several steps, PPO and GRPO weigh each (in a GPT: each token) by its
*importance ratio* ρ = π_θ/π_old, because E_old[ρ·f] = E_θ[f] for any f: weighted by ρ, samples of
the old policy average like samples of the new one (importance sampling). At the first step ρ is 1.

Why GRPO breaks on such a model:
  1. The order within a block is random, so π(completion) is a mean over B! orders per block: too
     many for a real B of 32. One takes a random *estimate* L̂ of log π (§3), and for ρ the estimate
     ρ̂ = exp(L̂_θ − L̂_old). L̂_θ and L̂_old each draw random numbers of their own.
  2. exp magnifies noise: completions whose ρ is 1 get a ρ̂ of 10,000 (§5).
  3. GRPO clips ρ̂ to [1−ε, 1+ε], but only where that lowers the objective (§6): with ρ̂ = 10,000 a
     good completion (A > 0) counts 0, and a bad one (A < 0) 10,000. So a step hardly does anything
     but make bad completions less likely, those with the largest noise. (Measured: of Σ weight·|A|
     over 256 completions the bad ones have 100 %, a single one 63 %; with StableDRL 55 and 5 %.)
  4. Steps that only unlearn destroy a policy: pushing log π up ends at log 1 = 0, pushing it down
     never ends, and all completions share θ. (README measures this without any ratio.)
StableDRL (§6) is two lines: clip every ratio, whatever the sign of A; then divide the ratios of a
group by their sum, so that they are shares of 1.

Where to look: §6 is the paper; `train` in §8 is the loop, in four numbered steps.
  §1 Transformer                 §4 Rollout              §7 Diagnostics
  §2 Attention masks             §5 The exact answers    §8 Training
  §3 Forward process and ELBO    §6 The losses           §9 Command line

Notation: symbol, name in the code, shape, meaning. A hat marks an estimate.
  q      prompts      (M, P)     M prompts of P tokens; in the toy task of addition, "12+34="
  y      completions  (N, L)     N = M·G, of L tokens, "46.."; rows i·G .. i·G+G−1 answer prompt i
  B      block_size              tokens per block; P and L are multiples of B. B = 2: "46", ".."
  G      group_size              completions per prompt
  K      copies                  copies of y with random tokens hidden ("noisy copies") per estimate
         masks        (N, K, L)  True where a copy has the token [MASK] in place of its own. (The
                                 attention masks of §2, (S, S), are another thing: who sees whom)
         steps        (N, L)     at which step of its block, 0..B−1, a place was written
  L̂_θ    log_prob     (N,)       estimate of log π_θ(y|q) in nats (natural logarithm)
  log ρ̂  log_ratio    (N,)       L̂_θ − L̂_old: one number per completion, not one per token
  A      advantages   (N,)       reward relative to the group
  ε      clip_eps                ratios are clipped to [1−ε, 1+ε]
  μ      mu                      optimiser steps ("updates") that use one batch of completions
"""

import argparse
import collections
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# A task makes prompts and judges answers, as strings: toy_tasks/__init__.py lists its parts.
from toy_tasks import TASKS, decode, encode

# ==== §1  Transformer =============================================================================
# What it teaches: nothing in here is diffusion. This is an ordinary transformer that is given its
# attention mask (who may look at whom): a causal one would make it a GPT, those of §2 make it a
# block-diffusion model. Three details matter later. A token's position is given, not counted, so
# that a noisy copy can sit at the positions of its original. [MASK] can be read and never written.
# And `read` returns the keys and values of what it has read, the *cache*: no finished text is read
# twice. In shapes: S tokens are read now, T is S plus the cached ones before; H heads, D features.

def rotate(x, turns):
    """Rotary position embedding (Su et al. 2021), (..,S,D) -> (..,S,D): pairs of features are
    complex numbers; turns (S,D/2) turns them by an angle that grows with the position."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # (.., S, D/2)
    return torch.view_as_real(pairs * turns).flatten(-2)

class Layer(nn.Module):
    """One layer of a pre-norm transformer: add what attention says, then what the MLP says."""
    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(d_model, bias=False)
        self.norm2 = nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x, turns, mask, cache):
        """x (N,S,d_model), mask (S,T), cache (2,M,H,T−S,D) or None -> (N,S,d_model), and keys and
        values of all T tokens, the new cache (2,N,H,T,D)."""
        qkv = self.qkv(self.norm1(x))  # (N, S, 3·d_model)
        qkv = qkv.unflatten(-1, (3, self.n_head, -1))  # (N, S, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, S, D)
        keys_values = torch.stack((rotate(k, turns), v))  # (2, N, H, S, D)
        if cache is not None:
            samples = len(x) // cache.shape[1]  # completions per prompt; 1 where each has a cache
            cache = cache.repeat_interleave(samples, dim=1)  # (2, N, H, T−S, D)
            keys_values = torch.cat((cache, keys_values), dim=3)  # (2, N, H, T, D)
        y = F.scaled_dot_product_attention(rotate(q, turns), *keys_values, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), keys_values

class BlockDiffusionTransformer(nn.Module):
    """Predicts every token at its own place (no shift by one) from whatever the mask lets it see.
    vocab_size counts [MASK], the last id. AssertionError if d_model is no multiple of 2·n_head."""
    def __init__(self, vocab_size, d_model=64, n_layer=2, n_head=4):
        super().__init__()
        assert d_model % (2 * n_head) == 0, f"d_model {d_model} is no multiple of 2·{n_head} heads"
        self.mask_id = vocab_size - 1
        self.head_dim = d_model // n_head
        self.embed = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, vocab_size - 1, bias=False)  # no row for [MASK]
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens, positions, mask):
        """tokens (N,S) long, positions (S,) long, mask (S,S) bool, True where the row may look at
        the column -> logits (N,S,vocab_size); that of [MASK] is −inf."""
        return self.read(tokens, positions, mask)[0]

    def read(self, tokens, positions, mask, cache=None):
        """Read tokens behind a cached text -> logits (N,S,vocab_size), and the new cache. mask
        (S,T); cache: what an earlier `read` returned, or None if no text stands before."""
        exponents = torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim
        turns = torch.exp(1j * positions[:, None] * 10_000.0**-exponents)  # (S, D/2)
        x = self.embed(tokens)  # (N, S, d_model)
        new_cache = []
        for i, layer in enumerate(self.layers):
            x, keys_values = layer(x, turns, mask, cache[i] if cache else None)
            new_cache.append(keys_values)
        logits = self.head(self.norm(x))
        return F.pad(logits, (0, 1), value=-math.inf), new_cache

# ==== §2  Attention masks =========================================================================
# What it teaches: how one pass scores every block, each given the true text before it, without any
# block seeing its own answer. To score block b the model must read the clean tokens before b
# (nothing hidden) and a noisy copy of b. The staircase does that for all blocks at once: the
# completion is laid out twice. The clean half is the text before each block, the noisy half asks
# the questions. A noisy token may look at clean blocks *strictly before* its own: with >= in place
# of that one > it would see its own answer, and the model would learn to copy. K noisy copies, with
# different tokens hidden, share the one clean half.

def check_lengths(block_size, *lengths):
    """AssertionError unless all are multiples: training and sampling would cut different blocks."""
    for length in lengths:
        assert length % block_size == 0, (
            f"lengths {lengths} must be multiples of block_size {block_size}")

def block_causal_mask(length, block_size, device=None):
    """(length, length) bool, True = the row may look at the column: at its own block and all before
    it. Finished text is read under this mask. For length 4 and block_size 2 (# = True):
        # # . .
        # # . .
        # # # #
        # # # #
    """
    block = torch.arange(length, device=device) // block_size  # (length,)
    return block[:, None] >= block[None, :]

def staircase_positions(prompt_len, completion_len, copies=1, device=None):
    """(S,) long, S = P + L + K·L: noisy copies reuse the positions P..P+L−1 of the completion."""
    clean = torch.arange(prompt_len + completion_len, device=device)  # (P + L,)
    return torch.cat((clean, clean[prompt_len:].repeat(copies)))

def staircase_mask(prompt_len, completion_len, block_size, copies=1, device=None):
    """(S,S) bool, True = the row may look at the column, for [prompt | clean completion | noisy
    copy 1 | .. | noisy copy K], S = P + L + K·L. AssertionError if P or L is no multiple of B.
    Source: the paper's staircase attention, with the algebra of BD3-LM's mask (Arriola et al. 2025)
    and a prompt that is never noisy. For P = 2, L = 4, B = 2, K = 2:
                  prompt  clean     copy 1    copy 2
        prompt      # #   . . . .   . . . .   . . . .
                    # #   . . . .   . . . .   . . . .
        clean       # #   # # . .   . . . .   . . . .
                    # #   # # . .   . . . .   . . . .
                    # #   # # # #   . . . .   . . . .
                    # #   # # # #   . . . .   . . . .
        copy 1      # #   . . . .   # # . .   . . . .
                    # #   . . . .   # # . .   . . . .
                    # #   # # . .   . . # #   . . . .
                    # #   # # . .   . . # #   . . . .
        copy 2      # #   . . . .   . . . .   # # . .
                    # #   . . . .   . . . .   # # . .
                    # #   # # . .   . . . .   . . # #
                    # #   # # . .   . . . .   . . # #
    """
    P, L = prompt_len, completion_len
    check_lengths(block_size, P, L)
    block = staircase_positions(P, L, copies, device) // block_size  # (S,) 0, 1, ..
    index = torch.arange(len(block), device=device)  # (S,)
    # (S,) k for noisy copy k; 0 for the clean completion and (negative before the clamp) the prompt
    copy = ((index - P) // L).clamp(min=0)
    from_block, to_block = block[:, None], block[None, :]
    from_copy, to_copy = copy[:, None], copy[None, :]
    clean_to_clean = (from_copy == 0) & (to_copy == 0) & (from_block >= to_block)
    noisy_to_clean = (from_copy > 0) & (to_copy == 0) & (from_block > to_block)  # must be >
    noisy_to_own_block = (from_copy > 0) & (from_copy == to_copy) & (from_block == to_block)
    return clean_to_clean | noisy_to_clean | noisy_to_own_block

# ==== §3  Forward process and ELBO ================================================================
# What it teaches: how tokens are hidden, and the one number that is both the loss of pretraining
# and the estimate L̂ of log π. The *forward process* of diffusion destroys a text; here it hides
# tokens: in every block it draws a count m uniformly from 1..B and puts [MASK] in place of m random
# tokens. The model predicts these. What has that to do with the probability of *writing* a block?
# (One block is enough: the logs of the blocks' probabilities add up to that of the completion.)
#   1. The model writes the B tokens one per step, in an order drawn by lot (§4):
#          π(block) = mean over all B! orders of  ∏ over the B steps of  p(token | what is visible)
#   2. The log of a mean is at least the mean of the logs (Jensen's inequality):
#          log π(block) ≥ mean over orders of  Σ over steps of  log p
#                       = B · (mean of log p over a random step of a random order)
#   3. When a random step begins, m tokens are hidden, with m uniform on 1..B. In a random order
#      every set of m tokens is equally likely to be the hidden one, and each of them equally
#      likely to be written next. So the mean over steps and orders in 2. is a mean over m and over
#      sets of m tokens, of (1/m)·Σ_hidden log p. (For B = 2: with probability 1/2 both are hidden,
#      with 1/4 the first alone, with 1/4 the second alone.) Times B, and summed over blocks:
#   ELBO(y) = E_masks[ Σ_blocks B/m · Σ_{i hidden} log p_θ(y_i | noisy block, clean text before) ]
# This *evidence lower bound* is at most log π_θ(y). Pretraining maximises it on right answers. RL
# computes the bracket for K random masks and takes their mean as L̂. `elbo` serves both.

def sample_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool, True = hidden: in each block m ~ U{1..B} random places, on the generator's
    device. AssertionError if completion_len is no multiple of block_size."""
    check_lengths(block_size, completion_len)
    blocks, device = (num_seqs, copies, completion_len // block_size), generator.device
    m = torch.randint(1, block_size + 1, (*blocks, 1), generator=generator, device=device)
    lots = torch.rand(*blocks, block_size, generator=generator, device=device)  # (N, K, L/B, B)
    rank = lots.argsort(-1).argsort(-1)  # argsort twice gives ranks: .7 .1 .4 -> 2 0 1
    return (rank < m).flatten(-2)  # (N, K, L)

def coupled_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool in pairs: in each block copy K/2 + k hides just the tokens that copy k shows, so
    that no token is missed (ESPO, arXiv 2512.03759). Where copy k shows none, its partner hides all
    as well: for B = 2 the pairs are (first, second), (second, first) and (both, both). So each copy
    alone is distributed as in `sample_masks`. AssertionError if K is odd."""
    assert copies % 2 == 0, f"coupled masks come in pairs: copies must be even, not {copies}"
    first = sample_masks(num_seqs, copies // 2, completion_len, block_size, generator)
    blocks = first.unflatten(-1, (-1, block_size))  # (N, K/2, L/B, B)
    second = ~blocks | blocks.all(-1, keepdim=True)
    return torch.cat((first, second.flatten(-2)), dim=1)

# What --masks means: name -> function(num_seqs, copies, completion_len, block_size, generator).
MASKS = {"independent": sample_masks, "coupled": coupled_masks}

def token_log_probs(model, prompts, completions, masks, block_size):
    """log p(y_i | its noisy block, the clean text before it) at every place i of every copy:
    prompts (M,P), completions (N,L), masks (N,K,L) bool -> (N,K,L). Where y_i is visible the value
    means nothing: callers must leave it out. Each prompt stands for N/M completions in a row. It is
    read once, under the first P rows of `staircase_mask`, into a cache; then one pass under the
    other rows reads [completion | K noisy copies]. Its cost grows with (K·L)²."""
    (N, K, L), P = masks.shape, prompts.shape[1]
    may_look = staircase_mask(P, L, block_size, K, prompts.device)  # (S, S), S = P + L + K·L
    positions = staircase_positions(P, L, K, prompts.device)  # (S,)
    noisy = torch.where(masks, model.mask_id, completions[:, None])  # (N, K, L)
    tokens = torch.cat((completions, noisy.flatten(1)), dim=1)  # (N, L + K·L)
    _, cache = model.read(prompts, positions[:P], may_look[:P, :P])
    logits, _ = model.read(tokens, positions[P:], may_look[P:], cache)  # (N, L + K·L, vocab)
    noisy_logits = logits[:, L:].mT  # (N, vocab, K·L), as cross_entropy wants it
    targets = completions.repeat(1, K)  # (N, K·L)
    return -F.cross_entropy(noisy_logits, targets, reduction="none").view(N, K, L)

def elbo(model, prompts, completions, masks, block_size, **unused):
    """L̂ in nats (N,): Monte-Carlo estimate, from K copies, of the ELBO of log π(completion |
    prompt). Its mean over masks is `exact_elbo` (§5). Every block of every copy must hide a token.
    """
    log_p = token_log_probs(model, prompts, completions, masks, block_size)  # (N, K, L)
    blocks = (-1, block_size)
    log_p, hidden = log_p.unflatten(-1, blocks), masks.unflatten(-1, blocks)  # (N, K, L/B, B)
    m = hidden.sum(-1, keepdim=True)  # (N, K, L/B, 1)
    per_copy = (block_size / m * hidden * log_p).sum((-2, -1))  # (N, K)
    return per_copy.mean(-1)

# ==== §4  Rollout =================================================================================
# What it teaches: how completions are sampled, and why their probability can be computed. Each step
# reveals one token of the block, then the model reads the block again. *Where* is drawn by lot
# (order="random"), *what* from the model's prediction for that place. So π(completion) is a plain
# mean over orders, §5 computes it, and RL trains this policy. In contrast, order="confidence"
# writes where the model is surest. It answers better, but where it writes then depends on all
# predictions: its probability is a harder sum, and it is used for evaluation only.
#   What is read at each step, for B = 2: right of the bar. Left of it: cached. _ is [MASK].
#     |12+34=      12+34=|__   12+34=|4_   12+34=|46      12+34=46|__   12+34=46|_.
# The fourth read only puts the finished block into the cache.

@torch.no_grad()
def generate(model, prompts, completion_len, block_size, temperature=1.0, order="random",
             generator=None, samples=1, return_steps=False):
    """Complete prompts (M,P), each `samples` times in a row -> (N,L) long, N = M·samples; with
    return_steps also (N,L) long, at which step of its block, 0..B−1, a place was written.
    temperature divides the logits; 0 takes the likeliest token. (Likelihoods are those of 1, §5.)
    AssertionError for a wrong order, if P or L is no multiple of B, or for logits not finite."""
    prompts = torch.as_tensor(prompts)
    (M, P), L, B, device = prompts.shape, completion_len, block_size, prompts.device
    check_lengths(B, P, L)
    assert order in ("random", "confidence"), f"order is 'random' or 'confidence', not {order!r}"
    positions = torch.arange(P + L, device=device)
    may_look = block_causal_mask(P + L, B, device)  # (P + L, P + L)

    completions = prompts.new_full((M * samples, L), model.mask_id)  # (N, L)
    steps = torch.zeros_like(completions)
    _, cache = model.read(prompts, positions[:P], may_look[:P, :P])
    for begin in range(P, P + L, B):
        end = begin + B
        here, visible = positions[begin:end], may_look[begin:end, :end]
        places = slice(begin - P, end - P)
        block = completions[:, places]  # (N, B), a view: writing here writes there
        lots = torch.rand(block.shape, generator=generator, device=device)
        for step in range(B):
            logits, _ = model.read(block, here, visible, cache)  # (N, B, vocab)
            priority = lots if order == "random" else logits.softmax(-1).amax(-1)  # (N, B)
            priority = priority.masked_fill(block != model.mask_id, -1)  # what is written stays
            place = priority.argmax(-1, keepdim=True)  # (N, 1)
            logits = logits.take_along_dim(place[:, :, None], dim=1)[:, 0]  # (N, vocab)
            assert logits.logsumexp(-1).isfinite().all(), "the model's logits are not finite"
            token = logits.argmax(-1, keepdim=True)  # (N, 1)
            if temperature > 0:
                p = (logits / temperature).softmax(-1)  # (N, vocab)
                token = torch.multinomial(p, 1, generator=generator)
            block.scatter_(1, place, token)
            steps[:, places].scatter_(1, place, step)
        if end < P + L:
            _, cache = model.read(block, here, visible, cache)
    return (completions, steps) if return_steps else completions

# ==== §5  The exact answers =======================================================================
# What it teaches: what L̂ is an estimate *of*, what the truth costs, what exp makes of noise, and
# how a ratio can do without. A block can be hidden in only 2^B − 1 ways: 3 for B = 2. With a noisy
# copy for each, a weighted sum of the log p is the ELBO without noise, and a sum over all ways to
# write the block is π itself.
#
# Where noise comes from. Say one of two tokens is certain and the other has p = 0.01, log p = −4.6,
# whatever is visible. With the weight B/m, L̂ of this block is
#     −4.6 if both are hidden (m = 2: one time in two),
#      0   if only the certain one is (m = 1: one time in four),
#     −9.2 if only the unlikely one is (m = 1: one time in four).
# That is right on average. But L̂_θ and L̂_old draw masks of their own, and may differ by 9.2
# though θ = θ_old: ρ̂ = e^9.2 = 10,000 where ρ = 1. (A coupled pair of §3 always gives −4.6.)
#
# What exp makes of it. Let η be the noise of the difference L̂_θ − L̂_old: log ρ̂ = log ρ + η, so
# ρ̂ = ρ·e^η. If η is normal with mean 0 and standard deviation σ, then E[e^η] = e^(σ²/2): at σ = 2
# nats ratios are 7 times too large on average, and a few huge ones make that average. (Real noise
# is worse, since jumps like that 9.2 add up over blocks: of 256 ratios the largest is about 300 if
# η is normal with σ = 2, and 6,000 to 10⁷ in the first batch of the main job.) K copies lower σ as
# 1/√K, coupled masks lower it more. If L̂_θ uses the masks of L̂_old again (--shared_masks), η
# nearly cancels; but the gradient of L̂_θ is as noisy as before. The other error, the *bias*
# log π − ELBO, hardly moves in a few updates, and so cancels in the ratio.
#
# A ratio without noise. The sampler draws a completion y *and* the order o in which to write it.
# The probability of the pair is a product over the steps: p(token | what was visible then), times
# the probability of o, which does not depend on θ. `trajectory` computes that product with a noisy
# copy per step: B of them, not 2^B − 1. Nothing is drawn, so its ratio is exactly 1 at θ = θ_old.
# This ratio is not ρ, but it is as good a weight: importance sampling works on pairs as well,
# E_old[π_θ(y,o)/π_old(y,o)·f(y)] = E_θ[f(y)]. (Its mean over o, weighted by π_old(o|y), is ρ.)

MAX_EXACT_BLOCK = 6  # 2^6 − 1 = 63 copies are still affordable

def mean_field(model, prompts, completions, block_size, **unused):
    """Log-probability (N,) if each block were written in one step from blanks, its tokens
    independent of each other (d1, Zhao et al., arXiv 2504.12216). No noise, but a bias."""
    everything = torch.ones_like(completions, dtype=torch.bool)[:, None]  # (N, 1, L)
    return token_log_probs(model, prompts, completions, everything, block_size).sum((-2, -1))

def every_pattern(model, prompts, completions, block_size):
    """log p under every way to hide a part of a block: (2^B−1, B) bool patterns, (N, 2^B−1, L/B, B)
    log p. A pattern hides the same places in all blocks: they do not see each other's copies.
    AssertionError if B is above MAX_EXACT_BLOCK."""
    B, L = block_size, completions.shape[1]
    assert B <= MAX_EXACT_BLOCK, f"2^B − 1 copies for block_size {B}: at most {MAX_EXACT_BLOCK}"
    sets = torch.arange(1, 2**B, device=completions.device)  # place i is hidden if bit i is 1
    patterns = (sets[:, None] >> torch.arange(B, device=sets.device)) % 2 == 1  # (2^B−1, B)
    masks = patterns.repeat(1, L // B).expand(len(completions), -1, -1)  # (N, 2^B−1, L)
    log_p = token_log_probs(model, prompts, completions, masks, B)  # (N, 2^B−1, L)
    return patterns, log_p.unflatten(-1, (-1, B))

def exact_elbo(model, prompts, completions, block_size, **unused):
    """The mean of `elbo` over all masks that `sample_masks` may draw, weighted (N,): no noise."""
    patterns, log_p = every_pattern(model, prompts, completions, block_size)
    # count m has probability 1/B, then the pattern 1/C(B,m); times the ELBO's B/m: 1/(C(B,m)·m)
    weights = [1 / (math.comb(block_size, m) * m) for m in patterns.sum(-1).tolist()]
    weights = log_p.new_tensor(weights)[:, None] * patterns  # (2^B−1, B)
    return (weights[:, None] * log_p).sum((1, 2, 3))  # (2^B−1, 1, B) · (N, 2^B−1, L/B, B)

def exact_log_likelihood(model, prompts, completions, block_size, **unused):
    """log π(completion | prompt) in nats (N,), of `generate` with order="random" and temperature=1.
    Per block, reach[h] is the probability that the sampler gets to the state in which exactly the
    set h is hidden, and the rest is right. It comes from a state in which one more place i was
    hidden, too: it chose i, one of |h∪i| places, and wrote y_i there. So
        reach[h] = Σ_{i not in h} reach[h∪i] / |h∪i| · p(y_i while h∪i is hidden)
    For B = 2: π = ½ p(a) p(b|a) + ½ p(b) p(a|b). For B = 6 these are 192 terms, and there are 720
    orders, of 6 factors each."""
    _, log_p = every_pattern(model, prompts, completions, block_size)  # (N, 2^B−1, L/B, B)
    everything = 2**block_size - 1  # sets are integers: place i is hidden if bit i is 1
    log_reach = {everything: torch.zeros_like(log_p[:, 0, :, 0])}  # (N, L/B) each
    for hidden in range(everything - 1, -1, -1):  # a set with one bit more is a larger number
        ways = []
        for i in range(block_size):
            if hidden >> i & 1 == 0:  # i is not in the set: it is the one that was written
                before = hidden + 2**i  # the set with i in it
                write_token = log_p[:, before - 1, :, i]  # (N, L/B); set s is row s−1
                ways.append(log_reach[before] + write_token - math.log(before.bit_count()))
        log_reach[hidden] = torch.stack(ways).logsumexp(0)
    return log_reach[0].sum(-1)

def trajectory(model, prompts, completions, steps, block_size, **unused):
    """log p(completion | prompt, order) in nats (N,): no noise. The order is that of `steps`, which
    `generate` returned; its own probability, 1/B! per block, is left out, as it does not depend on
    θ. B copies. Source: TraceRL (Wang et al., arXiv 2509.06949)."""
    step = torch.arange(block_size, device=steps.device)[:, None]  # (B, 1)
    hidden = steps[:, None] >= step  # (N, B, L): copy k is the completion as it was before step k
    log_p = token_log_probs(model, prompts, completions, hidden, block_size)  # (N, B, L)
    return log_p.take_along_dim(steps[:, None], dim=1).sum((-2, -1))  # a place at its own step

# What --estimator means: name -> function(model, prompts, completions, ..) -> (N,). The keywords
# `masks` (N,K,L), `steps` (N,L) and `block_size` are there for whoever names them.
ESTIMATORS = {
    "elbo": elbo,
    "trajectory": trajectory,
    "mean_field": mean_field,
    "exact_elbo": exact_elbo,
    "exact": exact_log_likelihood,
}

# ==== §6  The losses ==============================================================================
# What it teaches: the corner that GRPO leaves open, and the two lines with which StableDRL closes
# it. A GPT has a ratio per token. Here there is one per completion, with the noise of all its
# tokens: a token's term in an ELBO depends on which others were hidden, and is no probability.
#
# GRPO minimises −mean min(ρ̂·A, clip(ρ̂)·A). Let g be the gradient of L̂_θ(y) by θ. As L̂_old is
# constant, ρ̂ = exp(L̂_θ − L̂_old) has the gradient ρ̂·g. Where min takes the first term, the
# gradient is ρ̂·A·g; where it takes the second and the clip binds, that is a constant, gradient 0.
# Say ε = 0.2, ρ̂ = 1,000: for A = 1 it is min(1000, 1.2), gradient 0; for A = −1 it is
# min(−1000, −1.2), gradient −1000·g. All losses here move θ along Σ weight·A·g / divisor:
#     weight        GRPO, A > 0    GRPO, A < 0           StableDRL, any A
#     ρ̂ < 1−ε       ρ̂              0                     1−ε (cannot happen if ε ≥ 1)
#     in between    ρ̂              ρ̂                     ρ̂
#     ρ̂ > 1+ε       0              ρ̂, HOWEVER LARGE      1+ε
#     divisor       N              N                     Σ of the group's weights · number of groups
# The open corner has a reason: a bad completion that has become likelier must be pulled back hard.
# That is right for an exact ratio, which stays near 1. For an estimate, ρ̂ = 1,000 mostly says that
# the noise was 6.9 nats. `train` clips the gradient's norm to 1, with any loss: so what counts is
# its direction, and that is now the one that makes a few bad completions less likely.
#
# StableDRL moves θ, for each group, along
#     Σ_j w_j A_j g_j / Σ_j w_j,     w_j = clip(ρ̂_j, 1−ε, 1+ε)
# Line 1 clips whatever the sign of A. Line 2 divides by the group's sum: the update is a weighted
# mean of the A_j·g_j, so its norm is at most max_j |A_j|·‖g_j‖, whatever the ratios are. The w_j
# are constants to autograd: they say how much a completion counts, and are not to be optimised.
#     line 1 alone (clip_only)   groups with large ratios outweigh the others
#     line 2 alone (norm_only)   one outlier takes all the weight of its group
#     no ratio (no_ratio)        all weigh 1/G, as if the policy were still the one that sampled
# The price: no 0 in StableDRL's column. With GRPO, a completion that the updates of a batch have
# moved by more than ε, a good one up or a bad one down, has weight 0 and is moved no further; with
# StableDRL it is. So ε means two things: GRPO's (0.2) limits how far a batch may move the policy, a
# *trust region*; StableDRL's (5 in the paper) cuts a long tail. Where all ρ̂ are 1, the gradient of
# every loss here is −mean A·g: a step up the docstring's Σ A·log π, with L̂ for log π.

def group_advantages(rewards, group_size):
    """Rewards (N,) -> (N,): (reward − mean of its group) / (standard deviation of its group). Equal
    rewards give exactly 0: such a group teaches nothing. AssertionError as in `check_batch`."""
    check_batch(rewards, rewards, group_size)
    groups = rewards.view(-1, group_size)  # (M, G)
    groups = groups - groups[:, :1]  # so that equal rewards give 0, not a rounding error
    centred = groups - groups.mean(-1, keepdim=True)
    deviation = groups.std(-1, correction=0, keepdim=True)
    return (centred / (deviation + 1e-6)).flatten()

def check_batch(log_ratio, advantages, group_size):
    """AssertionError unless both are (N,) and N is a multiple of group_size."""
    N = log_ratio.numel()
    assert log_ratio.shape == advantages.shape == (N,), (
        f"both must have shape (N,), not {list(log_ratio.shape)} and {list(advantages.shape)}")
    assert N % group_size == 0, f"{N} completions are no multiple of group_size {group_size}"

def grpo_loss(log_ratio, advantages, clip_eps, group_size=1):
    """GRPO without KL term: log_ratio (N,), advantages (N,) -> scalar. group_size is not used."""
    check_batch(log_ratio, advantages, group_size)
    # float32 ends at e^88: stop at e^80. (The norm of the gradient, a root of squares, may still be
    # infinite: then `train` stops.) Subtract, as clamping log_ratio would zero its gradient.
    overflow = (log_ratio - 80).clamp(min=0).detach()
    ratio = (log_ratio - overflow).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    per_sequence = torch.minimum(ratio * advantages, clipped * advantages)
    return -per_sequence.mean()

def stabledrl_loss(log_ratio, advantages, clip_eps, group_size, normalise=True):
    """StableDRL: log_ratio (N,), advantages (N,) -> scalar, mean over groups. With logarithms
    nothing overflows: softmax(log w) = w/Σw. normalise=False divides by group_size instead."""
    check_batch(log_ratio, advantages, group_size)
    log_lower = math.log(1 - clip_eps) if clip_eps < 1 else -math.inf
    log_clipped = log_ratio.detach().clamp(log_lower, math.log(1 + clip_eps))  # line 1: always clip
    groups = log_clipped.view(-1, group_size)  # (M, G)
    weights = groups.softmax(-1) if normalise else groups.exp() / group_size  # line 2: divide by Σ
    per_sequence = weights.flatten() * advantages * log_ratio  # its gradient is weight·A·g
    return -per_sequence.view(-1, group_size).sum(-1).mean()

# What --loss means: name -> (function(log_ratio, advantages, clip_eps, group_size), its default ε).
LOSSES = {
    "grpo": (grpo_loss, 0.2),
    "stabledrl": (stabledrl_loss, 5.0),
    "clip_only": (functools.partial(stabledrl_loss, normalise=False), 5.0),  # without line 2
    "norm_only": (stabledrl_loss, 1e30),  # without line 1: no ρ̂ reaches this ε
    "no_ratio": (stabledrl_loss, 0.0),  # every ratio is clipped to 1
}

# ==== §7  Diagnostics =============================================================================
# What it teaches: what to watch before the reward falls: how far the ratios spread, and the norm of
# the gradient before it is clipped (in `train`, §8). Best is `spread` (there, too), the standard
# deviation of log ρ̂ at the first update of a batch, where every ρ is 1: it is the noise, and a
# model of any size can log it.

def ratio_diagnostics(log_ratio, clip_eps, group_size):
    """log_ratio (N,) -> dict of floats, about ratios before any clipping. ratio_max: the largest
    ρ̂. clip_fraction: the share of ρ̂ outside [1−ε, 1+ε], clipped by the loss or not. ess:
    effective sample size of a group, (Σρ̂)²/Σρ̂², mean over groups: G if all count alike, 1 if only
    one does."""
    log_ratio = log_ratio.detach().double()
    ratio = log_ratio.clamp(max=700).exp()  # e^710 is infinite, and JSON has no infinity
    outside = (ratio < 1 - clip_eps) | (ratio > 1 + clip_eps)
    share = log_ratio.view(-1, group_size).softmax(-1)  # (M, G): ρ̂/Σρ̂
    return {
        "ratio_max": ratio.max().item(),
        "clip_fraction": outside.double().mean().item(),
        "ess": (1 / share.square().sum(-1)).mean().item(),
    }

# ==== §8  Training ================================================================================
# What it teaches: where the old and the new policy part, in one loop, `train`. A batch of
# completions is sampled, scored by the policy as it is ("old"), and used for μ updates. At the
# first update θ = θ_old and every ρ is 1; later not. The *estimate* ρ̂ is noisy at the first, too,
# as L̂_θ draws its own masks (as in the paper; --shared_masks changes that). Prompts, samples and
# masks each have a random stream of their own, made from seed and batch: so with one seed all
# losses start from the same base and see the same prompts, whatever else they draw.

def stream(config, purpose):
    """A random generator for one purpose, a string: no other purpose draws from it."""
    seed = random.Random(f"{config.seed} {purpose}").getrandbits(63)
    return torch.Generator(config.device).manual_seed(seed)

def new_model(config, weights=None):
    """A model on config.device with these weights (a state dict), or untrained, by config.seed."""
    torch.manual_seed(config.seed)
    vocab_size = len(TASKS[config.task].vocab) + 1
    model = BlockDiffusionTransformer(vocab_size, config.d_model, config.n_layer, config.n_head)
    if weights:
        model.load_state_dict(weights)
    return model.to(config.device)

def answer(model, task, texts, block_size, **options):
    """The model answers M prompts (strings), options as in `generate`, and the task judges ->
    (batch, rewards (N,)). batch has all that an estimate of §5 needs beside model and masks:
    prompts (M,P), completions (N,L), their steps (N,L) and block_size."""
    device = model.embed.weight.device
    prompts = torch.as_tensor(encode(task, texts), device=device)
    completions, steps = generate(
        model, prompts, task.completion_len, block_size, return_steps=True, **options)
    samples = len(completions) // len(texts)
    answers = decode(task, completions)
    rewards = [float(task.reward(texts[i // samples], text)) for i, text in enumerate(answers)]
    batch = dict(prompts=prompts, completions=completions, steps=steps, block_size=block_size)
    return batch, torch.tensor(rewards, device=device)

def accuracy(model, task, block_size):
    """Share of 500 held-out prompts, always the same, solved by greedy decoding, surest first."""
    texts, _ = task.sample(np.random.default_rng(0), 500, "test")
    _, rewards = answer(model, task, texts, block_size, temperature=0, order="confidence")
    return (rewards == 1).double().mean().item()  # some tasks give less than 1 for less than right

def pretrain(config):
    """A policy for RL to start from: maximise the ELBO of right answers until `accuracy` reaches
    base_accuracy, so that something is left to learn. TimeoutError after 2,000 updates."""
    task, B = TASKS[config.task], config.block_size
    model = new_model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng = np.random.default_rng([config.seed, 0])  # 0: not the prompts of RL
    masking = stream(config, "pretrain")
    for update in tqdm(range(2000), disable=None):
        if update % 10 == 0 and accuracy(model, task, B) >= config.base_accuracy:
            return model
        texts, answers = task.sample(rng, 256, "train")
        prompts = torch.as_tensor(encode(task, texts), device=config.device)
        completions = torch.as_tensor(encode(task, answers), device=config.device)
        masks = sample_masks(256, 1, task.completion_len, B, masking)
        loss = -elbo(model, prompts, completions, masks, B).mean() / task.completion_len
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise TimeoutError(f"--base_accuracy {config.base_accuracy} is not reached in 2,000 updates")

def train(config, base):
    """RL from the base policy, a state dict -> (trained model, lines of the log as dicts). Each
    line of the log goes to the disk with a checkpoint; with config.resume, training goes on from
    there. FloatingPointError where a number is not finite, before that update is made."""
    task, B = TASKS[config.task], config.block_size
    G, mu = config.group_size, config.mu
    loss_function, _ = LOSSES[config.loss]
    estimate, draw_masks = ESTIMATORS[config.estimator], MASKS[config.masks]
    mask_shape = (config.prompts * G, config.copies, task.completion_len)  # (N, K, L)
    model = new_model(config, base)
    base_model = new_model(config, base)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, betas=(0.9, 0.99))
    rows = restore(config, model, optimizer)
    began = time.perf_counter()
    recent = collections.defaultdict(list)  # every number since the last line of the log
    # done: the updates made so far; more than 0 at the beginning if the run is resumed
    for done in range(len(rows) * config.log_every, config.updates, mu):
        log_is_due = (done + mu) % config.log_every == 0
        measure_noise = log_is_due and B <= MAX_EXACT_BLOCK

        # (1) The old policy answers each prompt G times, and the answers are judged.
        # For a loss of your own that draws from torch's global stream: a resumed run repeats it.
        torch.manual_seed(stream(config, f"yours {done}").initial_seed())
        rng = np.random.default_rng([config.seed, 1, done])
        texts, _ = task.sample(rng, config.prompts, "train")
        sampling = stream(config, f"samples {done}")
        masking = stream(config, f"masks {done}")
        batch, rewards = answer(model, task, texts, B, samples=G, generator=sampling)
        advantages = group_advantages(rewards, G)
        recent["reward"].append(rewards.mean().item())

        # (2) L̂_old: how likely the old policy finds them. And the truth, where the log wants it.
        masks = draw_masks(*mask_shape, B, masking)
        with torch.no_grad():
            old_log_prob = estimate(model, masks=masks, **batch)  # (N,)
            if measure_noise:
                old_truth = exact_log_likelihood(model, **batch)  # (N,)
                base_truth = exact_log_likelihood(base_model, **batch)  # (N,)
                recent["drift"].append((old_truth - base_truth).mean().item())

        # (3) μ updates learn from them: L̂_θ, the ratio, the loss, a step.
        for update in range(done + 1, done + mu + 1):
            if not config.shared_masks:
                masks = draw_masks(*mask_shape, B, masking)
            log_prob = estimate(model, masks=masks, **batch)  # (N,)
            log_ratio = log_prob - old_log_prob
            if update == done + 1:
                recent["spread"].append(log_ratio.std(correction=0).item())
            if measure_noise and update == done + mu:
                truth = exact_log_likelihood(model, **batch)
                noise = log_ratio - (truth - old_truth)
                recent["noise_std"].append(noise.std(correction=0).item())
            loss = loss_function(log_ratio, advantages, config.clip_eps, G)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            if not (loss + grad_norm + log_ratio.sum()).isfinite():  # if any of them is not
                raise FloatingPointError(
                    f"update {update} was not made: loss {loss:.3g}, gradient norm {grad_norm:.3g}")
            optimizer.step()
            recent["grad_norm"].append(grad_norm.item())
            for name, value in ratio_diagnostics(log_ratio, config.clip_eps, G).items():
                recent[name].append(value)

        # (4) A line of the log, and a checkpoint.
        if log_is_due:
            row = {"update": done + mu, "accuracy": accuracy(model, task, B)}
            for name, values in recent.items():
                row[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
            row["seconds"] = time.perf_counter() - began
            rows.append(row)
            save(config, model, optimizer, rows)
            say(f"{run_name(config)}  update {done + mu}  reward {row['reward']:.3f}")
            recent.clear()
    return model, rows

def save(config, model, optimizer, rows):
    """Write log.jsonl, then checkpoint.pt: a run that is killed in between makes the last line of
    its log again when it is resumed."""
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    first = dict(vars(config))
    del first["out"], first["resume"]  # the same run makes the same log wherever it is
    lines = [json.dumps(line) + "\n" for line in [first, *rows]]
    (folder / "log.jsonl").write_text("".join(lines))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}
    save_as(folder / "checkpoint.pt", state)

def save_as(path, state):
    """Write a file under another name, then rename it: a kill meanwhile leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
    os.replace(temporary, path)

def restore(config, model, optimizer):
    """With config.resume, set both to the run's checkpoint, if there is one -> its log so far."""
    path = run_folder(config) / "checkpoint.pt"
    if config.resume and path.exists():
        saved = load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["rows"]
    return []

def load(path):
    """What save_as saved: a dict. ValueError if the file is damaged."""
    try:
        return torch.load(path)  # weights only, torch's default: a hostile file runs no code
    except PermissionError:
        raise
    except Exception:  # damage shows in many ways
        raise ValueError(f"{path} is damaged: delete it, and it is made anew") from None

# ==== §9  Command line ============================================================================
# What it teaches: nothing new. The fields of `Config` are the flags, and the first line of a log. A
# flag with several values means a run for each combination, side by side on a CPU under Linux.

MAIN_JOB = [("grpo", "elbo"), ("grpo", "exact"), ("stabledrl", "elbo")]  # loss and estimator
CHOICES = {"task": TASKS, "loss": LOSSES, "estimator": ESTIMATORS, "masks": MASKS}
PANELS = {"reward": "linear", "ratio_max": "log", "grad_norm": "log"}  # columns of the log to draw

@dataclasses.dataclass
class BaseConfig:
    """What `pretrain` looks at. Runs that agree in all of this start from one base policy."""
    task: str = "addition"  # what to learn
    seed: int = 0  # every seed has a base policy of its own
    block_size: int = None  # B, tokens per block. None: the task's own
    d_model: int = 64  # width of the transformer
    n_layer: int = 2  # its layers
    n_head: int = 4  # attention heads per layer
    base_accuracy: float = 0.4  # pretraining stops at this accuracy
    device: str = "cpu"  # or cuda

@dataclasses.dataclass
class Config(BaseConfig):
    """The settings of one run. AssertionError, in one line, for numbers that cannot be."""
    loss: str = "stabledrl"  # §6
    estimator: str = "elbo"  # of log π, §3 and §5
    masks: str = "independent"  # how masks are drawn, §3
    shared_masks: int = False  # 0 or 1: L̂_θ uses the masks of L̂_old, in all μ updates
    copies: int = 1  # K, noisy copies behind one estimate
    clip_eps: float = None  # ε. None: the loss's own
    lr: float = 1e-4  # learning rate of RL
    prompts: int = 32  # prompts per batch of completions
    group_size: int = 8  # G, completions per prompt
    mu: int = 2  # μ, updates per batch of completions
    max_grad_norm: float = 1.0  # clip the norm of the gradient to this; 1e9: never
    updates: int = 1200  # updates of RL
    log_every: int = 40  # updates per line of the log
    out: str = "runs"  # folder for all that is written
    resume: int = False  # 0 or 1: go on with the runs whose folders exist

    def __post_init__(self):
        if self.block_size is None:
            self.block_size = TASKS[self.task].block_size
        if self.clip_eps is None:
            self.clip_eps = LOSSES[self.loss][1]
        counts = "block_size d_model n_layer n_head copies prompts group_size mu updates log_every"
        for name in counts.split():
            assert getattr(self, name) >= 1, f"--{name} must be at least 1"
        for name in "seed base_accuracy clip_eps lr max_grad_norm".split():
            assert 0 <= getattr(self, name) < math.inf, f"--{name} must be finite, and at least 0"
        assert self.log_every % self.mu == 0, "--log_every must be a multiple of --mu"
        assert self.updates % self.log_every == 0, "--updates must be a multiple of --log_every"

def run_name(config):
    """What folder, log and figure call a run: task, loss, estimator, all that differs from the
    defaults of `Config`, and the seed. For example addition-grpo-elbo-lr=0.0002-seed=0."""
    usual = vars(Config(task=config.task, loss=config.loss))
    unnamed = "estimator seed device out resume".split()
    words = [config.task, config.loss, config.estimator]
    for name, value in vars(config).items():
        if value != usual[name] and name not in unnamed:
            words.append(f"{name}={value}")
    return "-".join([*words, f"seed={config.seed}"])

def run_folder(config):
    """Where a run keeps log.jsonl and checkpoint.pt."""
    return Path(config.out, run_name(config))

def base_policy(config):
    """The weights of the policy from which a run starts. They are kept in config.out, in one file
    for all runs with the same BaseConfig, and pretrained if there is no such file."""
    values = [str(getattr(config, field.name)) for field in dataclasses.fields(BaseConfig)]
    path = Path(config.out, f"base-{'-'.join(values)}.pt")
    if not path.exists():
        save_as(path, pretrain(config).state_dict())
    return load(path)

def check(config):
    """An error, whose text is one line, for what cannot work: masks and estimate are tried once, on
    two completions, before any work is done."""
    task, B = TASKS[config.task], config.block_size
    model = new_model(config)
    texts, _ = task.sample(np.random.default_rng(0), 2, "train")
    generator = stream(config, "check")
    batch, _ = answer(model, task, texts, B, generator=generator)
    masks = MASKS[config.masks](2, config.copies, task.completion_len, B, generator)
    log_prob = ESTIMATORS[config.estimator](model, masks=masks, **batch)
    check_batch(log_prob, log_prob, 2)
    restore(config, model, torch.optim.Adam(model.parameters(), config.lr))
    folder = run_folder(config)
    if folder.exists() and not config.resume:
        raise ValueError(f"{folder} exists: --resume it, or choose another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)

def parse(argv):
    """Command line -> list of Config. Bad input: one line, status 2, before any work."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"stabledrl.py: error: {message}\n")
    for field in dataclasses.fields(Config):
        nargs = "*" if field.default is False else "+"  # --resume, or --resume 1, or --resume 0
        parser.add_argument(
            f"--{field.name}", type=field.type, nargs=nargs, choices=CHOICES.get(field.name))
    given = vars(parser.parse_args(argv))  # name of a flag -> its values
    for name, values in given.items():
        given[name] = dict.fromkeys(values or [1])  # each once; a bare --resume means 1
    points = [dict(zip(given, values)) for values in itertools.product(*given.values())]
    if not given.keys() & {"loss", "estimator"}:
        points = [dict(point, loss=loss, estimator=estimator)
                  for point in points for loss, estimator in MAIN_JOB]
    try:
        configs = []
        for point in points:
            task = TASKS[point.get("task", "addition")]
            config = Config(**(task.defaults | point))
            check(config)
            configs.append(config)
    except (ValueError, OSError, AssertionError, RuntimeError, TypeError) as error:
        parser.error(" ".join(str(error).split()))  # in one line
    return configs

def say(line):
    """Print. A closed pipe or a full disk behind stdout costs the line, not the run."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")

def attempt(config):
    """Train one run -> whether it came to its end. What may happen to a run is said."""
    try:
        train(config, base_policy(config))
        return True
    except (FloatingPointError, AssertionError, OSError) as error:
        say(f"{run_name(config)} FAILED: {error}")
        return False

def start_worker():
    """What a process does first: take one thread, die quietly on Ctrl-C, and be killed with the
    program, even by kill -9."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the signal if the parent dies
    signal.signal(signal.SIGINT, signal.SIG_DFL)

def attempt_all(configs):
    """`attempt` for all configs -> list of bool. Under Linux, on a CPU, as many side by side as
    torch would use threads; elsewhere one after the other."""
    jobs = min(len(configs), torch.get_num_threads())
    if jobs == 1 or sys.platform != "linux" or configs[0].device != "cpu":
        return [attempt(config) for config in configs]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, fork, start_worker) as pool:
        return list(pool.map(attempt, configs))

def plot(folders, out):
    """Draw the logs of runs: a panel per column, a line per run."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3), layout="constrained")
    for folder in folders:
        _, *rows = [json.loads(line) for line in open(folder / "log.jsonl")]
        updates = [row["update"] for row in rows]
        for axis, (column, scale) in zip(axes, PANELS.items()):
            axis.plot(updates, [row[column] for row in rows], label=folder.name)
            axis.set(title=column, xlabel="update", yscale=scale)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center")
    figure.savefig(f"{out}/plot.svg")

def main(argv=None):
    """Run what the command line asks for. Status 2 for bad input, 1 if a run failed."""
    configs = parse(argv)
    say(f"base policies: {configs[0].out}/base-*.pt; delete them after a change of task or model")
    for config in configs:
        base_policy(config)
    done = attempt_all(configs)
    try:
        plot([run_folder(config) for config in itertools.compress(configs, done)], configs[0].out)
    except ImportError:
        say("no figure: pip install matplotlib, and repeat the command with --resume")
    if not all(done):
        sys.exit(1)

if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, BrokenExecutor) as error:  # TimeoutError is an OSError
        sys.exit(f"stabledrl.py: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command with --resume goes on from the last lines")
