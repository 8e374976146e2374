"""StableDRL in one file: reinforcement learning for diffusion language models, where GRPO collapses.

This file is the algorithm of *Stabilizing Reinforcement Learning for Diffusion Language Models* (Zhong et al.,
arXiv 2603.06743), small enough to read in an hour and to run on a laptop. It trains a block-diffusion transformer on
toy tasks with blocks so short that the likelihood can be computed exactly: the noise that the paper reasons about is
measured here, and removed. Importing the file does nothing; every function can be used alone.

A diffusion language model, for those who know GPTs: it is trained to fill in blanks, from the text around them. It
writes by the same skill: start with blanks only, fill one in, look again. A *block*-diffusion model writes block after
block from left to right, as a GPT writes tokens; only within a block the order is free. Blocks of one token: a GPT.

Why GRPO breaks on such a model, in five steps:
  1. Within a block the order is random: π(completion) is a mean over orders, intractable for long blocks. Its log is
     replaced by a Monte-Carlo *estimate* L̂, and the importance ratio ρ = π_θ/π_old by ρ̂ = exp(L̂_θ − L̂_old).
  2. exp blows up the noise of L̂_θ − L̂_old: rollouts whose true ratio is 1 get ρ̂ = 50, or 80,000.
  3. GRPO's clip is conditional. Where A < 0 and ρ̂ > 1+ε it does not bind: noise multiplies the gradient, unbounded.
  4. The whole update then follows that one rollout. The policy drifts, and with it, says the paper, the noise grows.
  5. The reward collapses. StableDRL (§6) clips every ratio and divides by their sum: no rollout has unbounded weight.

How to read it: §6 is the paper. §2, §3 and §5 say where the noisy ratio comes from. The rest is what makes it run.
  §1 Transformer                 §4 Rollout              §7 Diagnostics
  §2 Attention masks             §5 The exact answers    §8 Training
  §3 Forward process and ELBO    §6 The two losses       §9 Command line

Notation: the paper's symbol, the name here, its shape. θ are the weights now, "old" those that sampled the completions;
a hat marks an estimate (ρ̂ of ρ, L̂ of log π); g_j is the gradient of L̂_θ(y_j).
  q      prompts       (N/G, P)    or (N, P): rows are group-major, i·G .. (i+1)·G−1 share one prompt
  y      completions   (N, L)      L tokens in L/B blocks; in the toy task "12+34=" -> "46..", P = 6, L = 4, B = 2
  B      block_size                tokens per block; P and L are multiples of B
  K      copies, --mc              Monte-Carlo samples (noisy copies of y) behind one estimate; the default is 1
  m      m                         hidden tokens of one block of one noisy copy, 1 .. B
  G      group_size                completions per prompt; N is a multiple of G
  L̂_θ    log_prob      (N,)        an estimate of log π_θ(y|q) in nats, summed over the tokens
  log ρ̂  log_ratio     (N,)        L̂_θ − L̂_old, one number per completion
  A      advantages    (N,)        how much better than its group a completion was
  ε      clip_eps                  ratios are clipped to [1−ε, 1+ε]
  μ      mu                        optimiser steps ("updates") that reuse one batch of rollouts
An attention *mask* says who sees whom (§2), *masks* say which tokens are hidden (§3). A *noisy copy* is y with tokens
hidden; elsewhere, *noise* is the error of L̂ or log ρ̂. In shapes, S and T count tokens, H heads, D a head's features.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from toy_tasks import TASKS, decode, encode

# ==== §1  Transformer =================================================================================================
# What it teaches: nothing in here is diffusion. This is a plain pre-norm transformer, which is given the positions and
# the attention mask. With a causal mask, and targets shifted by one, it would be a GPT; with the masks of §2 it is a
# block-diffusion model. Only two details matter later: a token's position is given, not counted, so that a noisy copy
# can sit at the positions of its original; and [MASK] has an embedding but no output: it can be read and never written.
# The keyword arguments of `forward` are for speed, and change no number: `token_log_probs` (§3) is the example to read.

def rotate(x, turns):
    """Rotary position embedding (Su et al. 2021): neighbouring features of x (N,S,..,D) are the two parts of a complex
    number, multiplied by `turns` (S,..,D/2), which has length 1 and an angle that grows with the position."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))                              # (N, S, .., D/2)
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)

class Block(nn.Module):
    """Pre-norm transformer block: add the attention's output, then the MLP's."""
    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(d_model, bias=False), nn.LayerNorm(d_model, bias=False)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x, turns, mask, ask=None, past=None):
        """x (N,S,d_model), turns (S,1,1,D/2), mask (S,T) -> (N,S,d_model), or (N,n,d_model) with ask; and the (k, v) of
        the T. BlockDiffusionTransformer.forward explains ask and past; here, past is that of one layer."""
        N, S, d_model = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, S, 3, self.n_head, d_model // self.n_head)         # (N, S, 3, H, D)
        q, k = rotate(qkv[:, :, :2], turns).permute(2, 0, 3, 1, 4)                               # each (N, H, S, D)
        v = qkv[:, :, 2].transpose(1, 2)                                                         # (N, H, S, D)
        if ask is not None:
            q, mask = q.take_along_dim(ask[:, None, :, None], dim=2), mask[ask][:, None]         # .., (N, 1, n, T)
            x = x.take_along_dim(ask[:, :, None], dim=1)                                         # (N, n, d_model)
        if past:                                            # of fewer rows, len(a): repeat each N/len(a) times
            k, v = (torch.cat((a[:, None].expand(-1, N // len(a), -1, -1, -1).flatten(0, 1), b), dim=2)
                    for a, b in zip(past, (k, v)))                                               # each (N, H, T, D)
        if S > 16:                                          # one result in three ways, each the fastest on a CPU:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                          # (N, H, S, D)
        elif k.shape[2] > 32:                               # fused; plain, for few queries;
            y = torch.where(mask, q / math.sqrt(q.shape[-1]) @ k.mT, -math.inf).softmax(-1) @ v
        else:                                               # keys before queries, for few keys as well
            y = torch.where(mask.mT, k @ (q / math.sqrt(q.shape[-1])).mT, -math.inf).softmax(-2).mT @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), (k, v)

class BlockDiffusionTransformer(nn.Module):
    """Predicts every token at its own place (no shift by one) from whatever the mask lets it see.

    vocab_size counts [MASK], which is the last id, `mask_id`. d_model / n_head must be an even integer.
    """
    def __init__(self, vocab_size, d_model=64, n_layer=2, n_head=4):
        super().__init__()
        self.mask_id = vocab_size - 1
        self.n_head, self.head_dim = n_head, d_model // n_head
        self.embed = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, vocab_size - 1, bias=False)                               # no row for [MASK]
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens, positions, mask, ask=None, past=None, keep=None):
        """tokens (N,S) long, positions (S,) long, mask (S,T) bool, True = may attend -> logits (N,S,vocab_size).

        A text that is read alone has T = S. The rest is for speed, and tested against that:
          ask    (N,n) long, which of the S tokens of a row: logits (N,n,vocab_size) of these alone
          keep   a list, to which every layer appends its keys and values, a pair of (N,H,T,D)
          past   such a list, (M,H,T−S,D): what the S tokens see before themselves. Each of its rows serves N/M rows
        """
        frequencies = 10_000.0 ** -(torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim)  # (D/2,)
        turns = torch.exp(1j * positions[:, None] * frequencies)[:, None, None]                  # (S, 1, 1, D/2)
        x = self.embed(tokens)                                                                   # (N, S, d_model)
        for i, block in enumerate(self.blocks):
            x, kv = block(x, turns, mask, ask if i == len(self.blocks) - 1 else None, past and past[i])
            if keep is not None:
                keep.append(kv)
        return F.pad(self.head(self.norm(x)).float(), (0, 1), value=-math.inf)                   # (N, S, vocab_size)

# ==== §2  Attention masks =============================================================================================
# What it teaches: how one pass scores every block, each given its true history, without any block seeing its answer.
#
# To score block b, the model must read the clean tokens before b, and a noisy copy of b. Done naively that is one
# pass per block. The staircase does all at once: the sequence is laid out twice, clean and noisy. The clean half gives
# the histories, the noisy half asks the questions. A noisy token may look at clean blocks *strictly before* its own:
# with >= in place of that one >, it would read its own answer, the loss would fall to 0, and it would learn to copy.
# K noisy copies with different tokens hidden share the one clean half. This is the definition; `token_log_probs` (§3)
# gets the same numbers from three smaller reads, since most of the picture below is empty.

def block_causal_mask(length, block_size, device=None):
    """(length, length) bool, True = row may attend to column: everything in its own block and in blocks before it.

    This is the mask under which a finished sequence is read, and under which completions are sampled (§4). For
    length 4 and block_size 2 (rows look, columns are looked at, # = may attend):

        # # . .
        # # . .
        # # # #
        # # # #
    """
    block = torch.arange(length, device=device) // block_size                                    # (length,)
    return block[:, None] >= block[None, :]

def staircase_positions(prompt_len, completion_len, copies=1, device=None):
    """(S,) long, S = P + L + copies·L: every noisy copy reuses the positions P .. P+L−1 of the tokens that it hides."""
    clean = torch.arange(prompt_len + completion_len, device=device)                             # (P + L,)
    return torch.cat((clean, clean[prompt_len:].repeat(copies)))

def staircase_mask(prompt_len, completion_len, block_size, copies=1, device=None):
    """(S, S) bool, True = row may attend to column, for [prompt | clean completion | noisy copy 1 | .. | noisy copy K].

    Source: the paper's staircase attention, the same algebra as the mask of BD3-LM (Arriola et al. 2025), with a
    prompt that is never noised, never copied, and read block by block like the rest. AssertionError if P or L is no
    multiple of B: training and sampling would then cut the text into different blocks. For P = 2, L = 4, B = 2, K = 2:

                      prompt  clean     copy 1    copy 2
        prompt          # #   . . . .   . . . .   . . . .
                        # #   . . . .   . . . .   . . . .
        clean           # #   # # . .   . . . .   . . . .
                        # #   # # . .   . . . .   . . . .
                        # #   # # # #   . . . .   . . . .
                        # #   # # # #   . . . .   . . . .
        copy 1          # #   . . . .   # # . .   . . . .
                        # #   . . . .   # # . .   . . . .
                        # #   # # . .   . . # #   . . . .
                        # #   # # . .   . . # #   . . . .
        copy 2          # #   . . . .   . . . .   # # . .
                        # #   . . . .   . . . .   # # . .
                        # #   # # . .   . . . .   . . # #
                        # #   # # . .   . . . .   . . # #
    """
    P, L, B = prompt_len, completion_len, block_size
    assert P % B == 0 and L % B == 0, f"prompt_len {P} and completion_len {L} must be multiples of block_size {B}"
    block = staircase_positions(P, L, copies, device) // B                                       # (S,)
    index = torch.arange(P + L + copies * L, device=device)                                      # (S,)
    copy = ((index - P) // L).clamp(min=0)                                                       # (S,) 0 = clean, 1..K
    from_block, to_block = block[:, None], block[None, :]
    from_copy, to_copy = copy[:, None], copy[None, :]
    clean_to_clean = (from_copy == 0) & (to_copy == 0) & (from_block >= to_block)
    noisy_to_clean = (from_copy > 0) & (to_copy == 0) & (from_block > to_block)                  # this one must be >
    noisy_to_own_block = (from_copy > 0) & (from_copy == to_copy) & (from_block == to_block)
    return clean_to_clean | noisy_to_clean | noisy_to_own_block

# ==== §3  Forward process and ELBO ====================================================================================
# What it teaches: what is hidden, and the one number that is both the pretraining loss and the likelihood estimate.
#
# The forward process of diffusion corrupts a text: here it hides tokens. In every block, draw m uniformly from 1..B and
# replace m random tokens by [MASK]. The model is asked for the hidden ones. Why does that bound a likelihood? Take one
# block (blocks add up, by the chain rule):
#   1. The model writes it in random order, so  log π = log(mean over orders of ∏ p),  a product over the B steps.
#   2. By Jensen,  log π ≥ mean over orders of Σ log p  =  B times the mean log p of a random step of a random order.
#   3. At a random step m tokens are still hidden, m uniform on 1..B: any set of m, and any of it comes next. So the
#      mean log p is the mean, over m and sets of m, of (1/m)·Σ_hidden log p. Times B: hence the weight B/m.
#
#     ELBO(y) = E_masks  Σ_blocks  B/m · Σ_i 1[y_i hidden] · log p_θ(y_i | noisy block, clean history)   ≤   log π_θ(y)
#
# (the evidence lower bound; i runs over the tokens of a block, m is that block's own count). Pretraining maximises it
# over data. RL takes a sample of it, with K draws of the masks, as L̂. One function, `elbo`, serves both.

def sample_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool, True = hidden, on the generator's device. Per block a count m ~ U{1..B}, then m random places."""
    shape, device = (num_seqs, copies, completion_len // block_size), generator.device
    m = torch.randint(1, block_size + 1, (*shape, 1), generator=generator, device=device)        # (N, K, L/B, 1)
    lots = torch.rand(*shape, block_size, generator=generator, device=device)                    # (N, K, L/B, B)
    rank = lots.argsort(-1).argsort(-1)                                                          # permutation of 0..B−1
    return (rank < m).flatten(-2)                                                                # (N, K, L)

def coupled_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool, K even (asserted): in each block copy K/2 + k hides what copy k shows, or all if that shows none. A
    pair misses no token. Either is drawn as in `sample_masks`: B−m, 0 as B, is uniform too (ESPO, arXiv 2512.03759)."""
    assert copies % 2 == 0, f"coupled masks come in pairs: copies must be even, not {copies}"
    masks = sample_masks(num_seqs, copies // 2, completion_len, block_size, generator)
    blocks = masks.unflatten(-1, (-1, block_size))                                               # (N, K/2, L/B, B)
    return torch.cat((masks, (~blocks | blocks.all(-1, keepdim=True)).flatten(-2)), dim=1)

# What --masks means: how masks are drawn, and whether L̂_θ uses those of L̂_old again, in all μ updates. Add yours here.
MASKS = {"independent": (sample_masks, False), "shared": (sample_masks, True), "coupled": (coupled_masks, False)}

def token_log_probs(model, prompts, completions, masks, block_size):
    """log p(y_i | its noisy block, the clean text before it) at every place i, meaningless where y_i is not hidden:
    prompts (N,P), or (N/G,P) if each has G completions in a row, completions (N,L), masks (N,K,L) bool -> (N,K,L).

    The same numbers as one pass over [prompt | completion | K noisy copies] under `staircase_mask`, in three steps: the
    cost grows with K, not with K². A prompt sees no completion, a completion no copy: so each is read once, and its
    keys and values are kept. No copy sees another: so each becomes a row of its own, behind what was kept.
    """
    (N, K, L), P, device = masks.shape, prompts.shape[1], prompts.device
    mask, positions = staircase_mask(P, L, block_size, 1, device), staircase_positions(P, L, 1, device)
    prompt, clean, C = [], [], P + L
    model(prompts, positions[:P], mask[:P, :P], ask=prompts[:, :0], keep=prompt)         # (N/G, 0): asks for no logits
    model(completions, positions[P:C], mask[P:C, :C], ask=completions[:, :0], past=prompt, keep=clean)
    noisy = torch.where(masks, model.mask_id, completions[:, None]).flatten(0, 1)                # (N·K, L)
    log_p = model(noisy, positions[C:], mask[C:], past=clean).log_softmax(-1)                    # (N·K, L, vocab)
    return log_p.view(N, K, L, -1).gather(-1, completions[:, None, :, None].expand(N, K, L, 1)).squeeze(-1)

def elbo(model, prompts, completions, masks, block_size):
    """L̂: the Monte-Carlo ELBO of log π(completion | prompt) in nats, from masks (N,K,L) -> (N,). Unbiased for
    `exact_elbo` with masks of `sample_masks` or `coupled_masks`. Every block of every copy must have a hidden token."""
    log_p = token_log_probs(model, prompts, completions, masks, block_size)                      # (N, K, L)
    log_p, hidden = (x.unflatten(-1, (-1, block_size)) for x in (log_p, masks))                  # (N, K, L/B, B)
    m = hidden.sum(-1, keepdim=True)                                                             # (N, K, L/B, 1)
    return (block_size / m * hidden * log_p).sum((-2, -1)).mean(-1)                              # (N, K) -> (N,)

# ==== §4  Rollout =====================================================================================================
# What it teaches: sampling, and which of its choices have a probability that somebody can compute.
#
# Blocks are written left to right. Inside a block one token is revealed per step, and the model looks again after each.
# order="random" draws the order of a block's places by lot, whatever the model says: then π(y) is a plain mean over
# orders, and §5 computes it exactly. This is the policy that RL trains. order="confidence" picks the place where the
# model is surest. It answers better, but the place now depends on all the probabilities, and the likelihood of y under
# *that* policy is another, harder sum: so it is used for evaluation only.

@torch.no_grad()
def generate(model, prompts, completion_len, block_size, temperature=1.0, order="random", generator=None, samples=1,
             per_step=1, threshold=math.inf, passes=None):
    """Complete prompts (M,P), each `samples` times in a row -> (N,L) long, N = M·samples. order is "random" or
    "confidence"; temperature 0 takes the likeliest. Parallel decoding: `per_step` tokens are revealed at once, and with
    "confidence" all places whose likeliest token exceeds `threshold`. The list `passes` gets each row's number, (N,).

    KV-cached: a finished block is read once, together with the blanks of the next one. Raises ValueError (options),
    AssertionError (P or L no multiple of B), FloatingPointError (probabilities that are not finite). §5 has the exact
    likelihood of order="random", temperature=1, per_step=1.
    """
    (M, P), L, B, device = prompts.shape, completion_len, block_size, prompts.device
    assert P % B == 0 and L % B == 0, f"prompt_len {P} and completion_len {L} must be multiples of block_size {B}"
    if order not in ("random", "confidence") or not temperature >= 0 or per_step < 1:
        raise ValueError(f"{order=}: 'random' or 'confidence'; {temperature=}: at least 0; {per_step=}: at least 1")
    N, positions, may_attend = M * samples, torch.arange(P + L, device=device), block_causal_mask(P + L, B, device)
    tokens = torch.cat((prompts.repeat_interleave(samples, 0), prompts.new_full((N, L), model.mask_id)), dim=1)
    past = []
    model(prompts, positions[:P], may_attend[:P, :P], ask=prompts[:, :0], keep=past)             # each prompt once
    known, total = P, 0.0       # tokens[:, :known] are in the past; total is NaN if a probability was: see the end
    needed = prompts.new_zeros(N)
    for start in range(P, P + L, B):
        places = torch.arange(start, start + B, device=device).expand(N, B)
        lots = torch.rand(N, B, generator=generator, device=device)   # drawn before the model is asked
        drawn = places.gather(1, lots.argsort(-1, descending=True))                              # (N, B)
        for step in range(0, B, per_step):
            ask = drawn[:, step : step + per_step] if order == "random" else places             # (N, n)
            new, read = slice(known, start + B), []
            logits = model(tokens[:, new], positions[new], may_attend[new, : start + B], ask - known, past, read)
            if step == 0:           # it has read the block before as well: keep that, and not the unfinished one
                past, known = [(k[:, :, :start], v[:, :, :start]) for k, v in read], start
            probs = (logits / (temperature or 1.0)).softmax(-1)                                  # (N, n, vocab)
            now = tokens.gather(1, ask)                                                          # (N, n)
            reveal = now == model.mask_id
            needed += reveal.any(-1)
            if order == "confidence":
                sure = probs.amax(-1).masked_fill(~reveal, -1.0)                                 # (N, B)
                rank = sure.argsort(-1, descending=True).argsort(-1)
                reveal &= (rank < per_step) | (sure > threshold)
            race = torch.empty_like(probs).exponential_(generator=generator) if temperature else 1.0
            chosen = (probs / race).argmax(-1)                      # p / Exp(1) is largest with probability p
            tokens.scatter_(1, ask, torch.where(reveal, chosen, now))
            total = total + probs.sum()
    if passes is not None:
        passes.append(needed)
    if not math.isfinite(total):
        raise FloatingPointError("the model's probabilities are not finite")
    return tokens[:, P:]

# ==== §5  The exact answers ===========================================================================================
# What it teaches: what L̂ is an estimate *of*, what the truth costs, and what exp makes of the error of L̂_θ − L̂_old.
#
# A block of B tokens has only 2^B − 1 ways to hide something. For B = 2 that is 3: give each a noisy copy, and get
# every conditional that the model can be asked for. A weighted sum of them is the ELBO without noise; a sum over the
# paths from "all hidden" to "none hidden" is log π itself. Real models use blocks of 32: 4 billion copies.
#
# What is wrong with an estimate, then? ELBO ≤ log π is a *bias*: 0.04 nats here, nearly gone in L̂_θ − L̂_old; estimator
# exact_elbo has only that. Monte-Carlo *noise* does not cancel. Say that one of two tokens of a block is
# certain, and the other has p = 0.01, log p = −4.6, whatever is shown. L̂ of the block is then −4.6 if both are hidden
# (one time in two), and 0 or −9.2 if one is (one in four each): right on average, but two draws may be 9.2 nats apart,
# a "ratio" of 10,000. Unlikely tokens make the noise, and its long tail: with θ = θ_old and K = 1, log ρ̂ deviates by
# 2 nats; one ρ̂ in 33 is above 50, one in 1,000 above 80,000 (README). More copies lower it as 1/√K; one coupled pair
# (§3), to 0.4, beats eight copies. If L̂_old and L̂_θ share masks, most of it cancels, at no cost; g stays as noisy.

def mean_field(model, prompts, completions, block_size):
    """The one-step proxy (N,): every block fully hidden, all its tokens scored at once, as if they were independent.
    Deterministic, but biased: this is the log-likelihood of a sampler that writes a block in one step."""
    everything = torch.ones_like(completions, dtype=torch.bool)[:, None]                         # (N, 1, L)
    return token_log_probs(model, prompts, completions, everything, block_size).sum((-2, -1))

def every_pattern(model, prompts, completions, block_size):
    """log p under every way to hide a part of a block: (2^B−1, B) bool patterns, (N, 2^B−1, L/B, B) log p.
    Pattern number s−1 hides the places that are the 1-bits of s; all blocks use it at once, in a copy of its own."""
    (N, L), B, device = completions.shape, block_size, completions.device
    s = torch.arange(1, 2**B, device=device)
    patterns = (s[:, None] >> torch.arange(B, device=device)) & 1 == 1                           # (2^B−1, B)
    masks = patterns.repeat(1, L // B).expand(N, -1, -1)                                         # (N, 2^B−1, L)
    return patterns, token_log_probs(model, prompts, completions, masks, B).unflatten(-1, (-1, B))

def exact_elbo(model, prompts, completions, block_size):
    """The expectation of `elbo` over `sample_masks` (N,): each pattern with its probability, one pass, no noise."""
    patterns, log_p = every_pattern(model, prompts, completions, block_size)
    m = patterns.sum(-1, keepdim=True)                                                           # (2^B−1, 1)
    ways = torch.tensor([math.comb(block_size, i) for i in range(block_size + 1)], device=m.device)[m]  # (2^B−1, 1)
    probability = 1 / (block_size * ways)        # one of B counts m, then one of the C(B, m) patterns with that count
    weight = probability * (block_size / m) * patterns                                           # (2^B−1, B)
    return (weight[:, None] * log_p).sum((1, 2, 3))

def exact_log_likelihood(model, prompts, completions, block_size):
    """log π(completion | prompt) of `generate` with order="random", temperature=1, in nats (N,). At least `exact_elbo`.

    Per block, reach[h] is the probability that the sampler, on its way, has exactly the set h still hidden and the
    rest right. It gets there from any set h∪i with one token more, by picking that token (1/size) and writing it (p):
        reach[h] = Σ_{i not in h}  reach[h∪i] · p(y_i | h∪i hidden) / |h∪i|          reach[all] = 1,  π = reach[∅]
    B·2^(B−1) additions where a sum over orders has B! terms. Sets are the 1-bits of integers, as in `every_pattern`.
    """
    _, log_p = every_pattern(model, prompts, completions, block_size)                            # (N, 2^B−1, L/B, B)
    everything = 2**block_size - 1
    log_reach = {everything: torch.zeros_like(log_p[:, 0, :, 0])}                                # (N, L/B) each
    for hidden in range(everything - 1, -1, -1):                      # a set with one bit more is a larger number
        paths = []
        for i in range(block_size):
            before = hidden | 1 << i
            if before != hidden:
                paths.append(log_reach[before] + log_p[:, before - 1, :, i] - math.log(before.bit_count()))
        log_reach[hidden] = torch.stack(paths).logsumexp(0)
    return log_reach[0].sum(-1)

MAX_EXACT_BLOCK = 8  # 255 copies: above this, exact estimators are refused, and the noise is not measured

# What --estimator means: name -> function(model, prompts, completions, masks, block_size) -> (N,). Add yours here.
ESTIMATORS = {
    "elbo": elbo,
    "mean_field": lambda model, prompts, completions, masks, B: mean_field(model, prompts, completions, B),
    "exact_elbo": lambda model, prompts, completions, masks, B: exact_elbo(model, prompts, completions, B),
    "exact": lambda model, prompts, completions, masks, B: exact_log_likelihood(model, prompts, completions, B),
}

# ==== §6  The two losses ==============================================================================================
# What it teaches: the corner that GRPO leaves open, StableDRL's line 1, which closes it (clip always), and its line 2,
# which bounds the gradient of a group (divide by the sum of its weights).
#
# Textbook GRPO has one ratio per token. An ELBO has no such parts: a token's term depends on which others were hidden,
# and is missing where it was not hidden itself. So there is one ratio per completion, and it sums all the noise. Either
# loss multiplies A·∇L̂_θ by a weight and divides. GRPO minimises −mean min(ρ̂A, clip(ρ̂)A). As ∇ρ̂ = ρ̂·∇L̂_θ, its weight
# is ρ̂ where the first term is the smaller, and 0 where the clipped one, a constant, is.
#
#                  GRPO, A > 0      GRPO, A < 0            StableDRL, either sign
#     ρ̂ < 1−ε      ρ̂                0                      1−ε (no such ρ̂ if ε ≥ 1)
#     in between   ρ̂                ρ̂                      ρ̂
#     ρ̂ > 1+ε      0                ρ̂, WITHOUT BOUND       1+ε
#     divisor      N                N                      Σ of the group's weights, then the number of groups
#
# GRPO's open corner has a reason: a bad completion that has become likelier must be pulled back hard. That is right for
# an exact ratio, which is rarely far from 1. For an estimate, ρ̂ = 1,000 says only that noise was 6.9 nats, and the
# update is that one rollout. Clipping the gradient's norm shortens such a step, but keeps its direction.
#
# StableDRL clips whatever the sign of A, and divides by the weights' sum. It ascends the mean over groups of
#     ∇J = Σ_j w_j A_j g_j / Σ_j w_j,   w_j = clip(ρ̂_j, 1−ε, 1+ε),   g_j = ∇L̂_θ(y_j),   j in the group
# Line 2 makes this a weighted mean, in the convex hull of the A_j·g_j: its norm is at most max_j |A_j|·‖g_j‖, whatever
# the ratios, and every group counts alike. Alone (norm_only), it lets one outlier take all the weight of its group.
# Line 1 alone (clip_only) bounds each weight by 1+ε, but the gradient's size swings with the ratios. The w are
# detached: the product rule would add a term with ∇w, which leaves the hull. ε means two things: in GRPO, 0.2, a trust
# region; here the tail's cut at 1+ε, ε = 5 in the paper. The price: with no 0 in StableDRL's column, what has moved
# far is pushed on. Even with the exact ratio it may collapse at a learning rate at which GRPO learns; given GRPO's two
# zeros (at 1 ± 0.2) it does not (README). At ρ̂ = 1 every loss has the plain policy gradient, −mean A·g.

def group_advantages(rewards, group_size):
    """Rewards (N,), group-major -> advantages (N,): minus the group's mean, over its standard deviation (GRPO).
    A group whose rewards are all equal carries no signal, and gets exact zeros."""
    groups = rewards.view(-1, group_size)                                                        # (N/G, G)
    groups = groups - groups[:, :1]                   # first, so that equal rewards cancel exactly and not to 1e-8
    centred = groups - groups.mean(-1, keepdim=True)
    return (centred / (groups.std(-1, correction=0, keepdim=True) + 1e-6)).flatten()

def grpo_loss(log_ratio, advantages, clip_eps):
    """GRPO, without KL term: (N,), (N,) -> scalar. The clip binds only where it lowers the objective; the divisor is N.
    In float64: float32 ends at e^88, and there a clipped corner, whose gradient is 0, would give 0·∞ = NaN."""
    ratio = log_ratio.double().exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    per_sequence = torch.minimum(ratio * advantages, clipped * advantages)
    return -per_sequence.mean()

def stabledrl_loss(log_ratio, advantages, clip_eps, group_size, normalise=True):
    """StableDRL: (N,), (N,) -> scalar, a mean over groups. The clip always binds; the divisor is the sum of the group's
    clipped ratios, or with normalise=False their number G. It works with logarithms, so that no ratio overflows."""
    log_lower = math.log(1 - clip_eps) if clip_eps < 1 else -math.inf
    log_clipped = log_ratio.detach().clamp(log_lower, math.log(1 + clip_eps)).view(-1, group_size)      # line 1: clip
    log_divisor = log_clipped.logsumexp(-1, keepdim=True) if normalise else math.log(group_size)        # line 2: divide
    weights = (log_clipped - log_divisor).exp().flatten()                                        # (N,)
    per_sequence = weights * advantages * log_ratio                   # ∇log_ratio is g; ρ̂ is in the weights
    return -per_sequence.view(-1, group_size).sum(-1).mean()

# What --loss means: name -> (function(log_ratio, advantages, clip_eps, group_size), default clip_eps). Add yours here.
# The paper's ablations: StableDRL without line 2, without line 1 (ε = ∞), with all ratios set to 1 (ε = 0). Where the
# loss fixes its ε, the 5.0 beside it is only for the clip_fraction of the log.
LOSSES = {
    "grpo": (lambda log_ratio, A, clip_eps, G: grpo_loss(log_ratio, A, clip_eps), 0.2),
    "stabledrl": (stabledrl_loss, 5.0),
    "clip_only": (functools.partial(stabledrl_loss, normalise=False), 5.0),
    "norm_only": (lambda log_ratio, A, clip_eps, G: stabledrl_loss(log_ratio, A, math.inf, G), 5.0),
    "no_ratio": (lambda log_ratio, A, clip_eps, G: stabledrl_loss(log_ratio, A, 0.0, G), 5.0),
}

# ==== §7  Diagnostics =================================================================================================
# What it teaches: what to watch. The largest ratio and the effective sample size tell how far the ratios spread, under
# any loss; the gradient's norm before clipping (§8) tells what the loss makes of them. And the noise itself, estimate
# minus truth, is what only a toy can show. It is measured in nats, and includes what is left of the ELBO's bias.

def ratio_diagnostics(log_ratio, clip_eps, group_size, true_log_ratio=None):
    """log_ratio (N,) -> dict of floats, all about the ratios before any clipping:

    ratio_max      the largest ρ̂ of the batch
    clip_fraction  the share of ρ̂ outside [1−ε, 1+ε], whether or not the loss clips them
    ess            (Σρ̂)² / Σρ̂² of a group, averaged over groups: G if all count alike, 1 if one has all the weight
    noise_mean, noise_std, noise_p999      log ρ̂ − log ρ in nats: mean, standard deviation, 99.9th percentile (in a
                   batch of 256 that is just below the largest); only if true_log_ratio (N,) is given
    """
    log_ratio = log_ratio.double()
    ratio = log_ratio.clamp(max=700).exp()                            # beyond e^709 is ∞, and JSON has no ∞
    share = log_ratio.view(-1, group_size).softmax(-1)                                           # (N/G, G)
    values = {
        "ratio_max": ratio.max(),
        "clip_fraction": ((ratio < 1 - clip_eps) | (ratio > 1 + clip_eps)).double().mean(),
        "ess": (1 / share.square().sum(-1)).mean()}
    if true_log_ratio is not None:
        noise = log_ratio - true_log_ratio
        values["noise_mean"], values["noise_std"] = noise.mean(), noise.std(correction=0)
        values["noise_p999"] = noise.quantile(0.999)
    return dict(zip(values, torch.stack(list(values.values())).tolist()))

# ==== §8  Training ====================================================================================================
# What it teaches: where old and new policy diverge. Completions are sampled, scored, and used for μ optimiser steps. At
# the first step θ = θ_old and every true ratio is 1; later it is not, and ρ corrects for that. The *estimate* ρ̂ is
# noisy from the first step on, since L̂_old and L̂_θ draw their masks independently (--masks independent, as in the
# paper's analysis). There are three policies: the base (`reference`), where RL starts; old, which sampled this batch;
# and `model`, in training. Random streams are separate, and depend on the seed alone: with one seed, all losses and
# estimators start from the same base and see the same prompts in the same order. `config` is the dataclass of §9.

UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, LookupError, TypeError, ValueError,
              AttributeError, OverflowError)                          # what a damaged or hostile file may raise

class TrainingFailed(Exception):
    """Training cannot go on. The message is one line for the user: what happened and where."""

def run_folder(config):
    """Where a run keeps its log.jsonl and checkpoint.pt."""
    return Path(config.out) / f"{config.task}-{config.loss}-{config.estimator}-seed{config.seed}"

class Rollouts(NamedTuple):
    """N = prompts × group_size completions, and all that stays fixed while μ updates learn from them."""
    prompts: torch.Tensor                                             # (N/G, P) long
    completions: torch.Tensor                                         # (N, L) long, group-major
    advantages: torch.Tensor                                          # (N,)
    reward: float                                                     # mean over the N
    masks: torch.Tensor                                               # (N, K, L) bool, those of old_log_prob
    old_log_prob: torch.Tensor                                        # (N,) L̂_old
    old_truth: torch.Tensor | None                                    # (N,) exact log π_old, if noise will be measured
    drift: float | None                                               # KL(π_old ‖ base policy), from the same samples

def stream(config, name, device):
    """A torch.Generator of its own for every purpose: one more draw of masks must not change what is sampled."""
    seed = np.random.SeedSequence([config.seed, *name.encode()]).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(seed))

def new_model(task, config, device):
    """An untrained model, the same for the same seed; its forward wrapped as --bf16 and --compile ask."""
    with torch.random.fork_rng(devices=[]):                           # leaves the global random state as it was
        torch.manual_seed(config.seed)
        model = BlockDiffusionTransformer(len(task.vocab) + 1, config.d_model, config.n_layer, config.n_head)
    if config.bf16:
        model.forward = torch.autocast(torch.device(device).type, torch.bfloat16)(model.forward)
    if config.compile:
        model.forward = torch.compile(model.forward)
    return model.to(device)

def answer(model, task, prompts, block_size, samples=1, **sampling):
    """Complete prompts (M str), each `samples` times -> tokens (M,P), completions (N,L), rewards (N,), texts (N)."""
    device = next(model.parameters()).device
    tokens = torch.tensor(encode(task, prompts), device=device)
    completions = generate(model, tokens, task.completion_len, block_size, samples=samples, **sampling)
    texts = decode(task, completions.tolist())
    rewards = torch.tensor([float(task.reward(prompts[i // samples], c)) for i, c in enumerate(texts)], device=device)
    return tokens, completions, rewards, texts

def accuracy(model, task, block_size, n=500, **decoding):
    """Share of `n` held-out prompts, always the same, solved by greedy decoding, most confident first (§4)."""
    prompts, _ = task.sample(np.random.default_rng(0), n, "test")
    rewards = answer(model, task, prompts, block_size, temperature=0.0, order="confidence", **decoding)[2]
    return (rewards == 1).double().mean().item()

def pretrain(task, config, device):
    """The base policy: maximise the ELBO of right answers, and stop at --base_accuracy, so that RL has work to do.
    TrainingFailed if --pretrain_updates do not get there, FloatingPointError if the model breaks on the way."""
    model = new_model(task, config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.pretrain_lr, weight_decay=0.0)
    rng, generator = np.random.default_rng([config.seed, 0]), stream(config, "pretrain", device)
    for update in (bar := tqdm(range(config.pretrain_updates + 1), desc=f"pretrain seed {config.seed}", leave=False)):
        if update % 10 == 0 or update == config.pretrain_updates:
            reached = accuracy(model, task, config.block_size)
            bar.set_postfix_str(f"accuracy {reached:.2f} of {config.base_accuracy:.2f}")
            if reached >= config.base_accuracy:
                return model
        prompts, answers = (torch.tensor(encode(task, t), device=device) for t in task.sample(rng, 256, "train"))
        masks = sample_masks(256, 1, task.completion_len, config.block_size, generator)
        loss = -elbo(model, prompts, answers, masks, config.block_size).mean() / task.completion_len
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise TrainingFailed(f"it reached accuracy {reached:.2f}, not --base_accuracy {config.base_accuracy}, "
                         f"in {config.pretrain_updates} updates: raise --pretrain_updates, or ask for less")

@torch.no_grad()
def collect(model, task, config, rng, sample_stream, mask_stream, reference=None):
    """Sample --prompts × --group_size completions, judge them, estimate their log-probability -> Rollouts. The streams
    are those of prompts (rng), sampler, masks. With a `reference` model, also the truth, and the drift from there."""
    texts, _ = task.sample(rng, config.prompts, "train")
    B, truth = config.block_size, None
    prompts, completions, rewards, _ = answer(model, task, texts, B, config.group_size, generator=sample_stream)
    hidden = MASKS[config.masks][0](len(completions), config.mc, task.completion_len, B, mask_stream)
    if reference is not None:
        truth, before = (exact_log_likelihood(m, prompts, completions, B) for m in (model, reference))
    return Rollouts(
        prompts=prompts, completions=completions, reward=rewards.mean().item(), masks=hidden,
        advantages=group_advantages(rewards, config.group_size),
        old_log_prob=ESTIMATORS[config.estimator](model, prompts, completions, hidden, B),
        old_truth=truth, drift=None if truth is None else (truth - before).mean().item())

def policy_update(model, optimizer, rollouts, config, mask_stream, measure_noise=False):
    """One optimiser step on one batch of rollouts -> dict: reward, drift, the diagnostics of §7, and grad_norm before
    clipping. measure_noise needs old_truth. FloatingPointError, before the step, where a number is not finite."""
    prompts, completions, B = rollouts.prompts, rollouts.completions, config.block_size
    draw, again = MASKS[config.masks]
    hidden = rollouts.masks if again else draw(*rollouts.masks.shape, B, mask_stream)
    log_prob = ESTIMATORS[config.estimator](model, prompts, completions, hidden, B)              # (N,) L̂_θ
    tokens = completions.shape[1] if config.per_token else 1
    log_ratio, true_log_ratio = (log_prob - rollouts.old_log_prob) / tokens, None
    if config.spikes:                                                 # the paper's stress test: exploding weights
        lots = torch.rand(len(log_ratio), generator=mask_stream, device=log_ratio.device)
        log_ratio = log_ratio + math.log(1e5) * (lots < config.spikes)
    if measure_noise:
        with torch.no_grad():                                                                    # (N,) log ρ
            true_log_ratio = (exact_log_likelihood(model, prompts, completions, B) - rollouts.old_truth) / tokens
    loss = LOSSES[config.loss][0](log_ratio, rollouts.advantages, config.clip_eps, config.group_size)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    if not math.isfinite(grad_norm + loss.detach() + log_ratio.detach().sum()):
        worst = log_ratio.detach().abs().nan_to_num(math.inf).argmax().item()
        text = "".join(decode(TASKS[config.task], [prompts[worst // config.group_size], completions[worst]]))
        raise FloatingPointError(f"the loss is {loss:.4g}, the gradient's norm {grad_norm:.4g}, and the log-ratio of "
                                 f"sample {worst}, {text!r}, {log_ratio[worst]:.4g}")
    optimizer.step()
    return {"reward": rollouts.reward, "drift": rollouts.drift, "grad_norm": grad_norm.item(),
            **ratio_diagnostics(log_ratio, config.clip_eps, config.group_size, true_log_ratio)}

def log_row(update, recent, accuracy_now, seconds):
    """One line of the log, from the values of all updates since the line before (`recent`, a list of dicts): means of
    reward, grad_norm, ess and clip_fraction, the maximum of ratio_max; noise and drift are those of the last update."""
    mean = {name: float(np.mean([v[name] for v in recent])) for name in ("reward", "grad_norm", "ess", "clip_fraction")}
    last = {name: recent[-1].get(name) for name in ("noise_mean", "noise_std", "noise_p999", "drift")}
    return {"update": update, "accuracy": accuracy_now, "ratio_max": max(v["ratio_max"] for v in recent),
            **mean, **last, "seconds": round(seconds, 2)}

class Run:
    """A training run between two updates: all that a checkpoint must hold. Starts from the policy `base` (state dict),
    or from the checkpoint in its folder, if there is one. ValueError, one line, if that cannot be used."""
    def __init__(self, task, config, device, base=None):
        self.path, self.config = run_folder(config) / "checkpoint.pt", config
        self.settings = {name: value for name, value in vars(config).items() if name not in ("out", "resume", "jobs")}
        self.model, self.reference = new_model(task, config, device), new_model(task, config, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.rng = np.random.default_rng([config.seed, 1])
        self.streams = {name: stream(config, name, device) for name in ("samples", "masks")}
        self.rollouts, self.recent, self.rows, self.update, self.seconds = None, [], [], 0, 0.0
        if not os.path.lexists(self.path):
            self.model.load_state_dict(base)
            self.reference.load_state_dict(base)
            return
        try:                                                          # weights_only: a hostile file runs no code
            self.restore(torch.load(self.path, map_location=device, weights_only=True))
        except UNREADABLE as error:
            raise ValueError(f"{self.path} cannot be resumed: {' '.join(repr(error).split())[:400]}") from None

    def save(self):
        """Write checkpoint and log, each to another name, all the way to the disk, then rename: a crash leaves the last
        good one. `train` begins with a save, which brings the two together again."""
        state = {
            "config": self.settings, "base": self.reference.state_dict(), "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "rollouts": self.rollouts and self.rollouts._asdict(),
            "rng": self.rng.bit_generator.state, "streams": [each.get_state() for each in self.streams.values()],
            **{name: vars(self)[name] for name in ("recent", "rows", "update", "seconds")}}
        log = "".join(json.dumps(line) + "\n" for line in (self.settings, *self.rows)).encode()
        for path, write in ((self.path, lambda file: torch.save(state, file)),
                            (self.path.with_name("log.jsonl"), lambda file: file.write(log))):
            with open(path.with_suffix(".tmp"), "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, path)

    def restore(self, saved):
        """Restore what `save` wrote. Only --updates may differ now, down to what is done, and not with --decay."""
        was = saved["config"] | ({} if self.config.decay else {"updates": self.config.updates})
        changed = [name for name, now in self.settings.items() if was.get(name) != now]
        if changed:
            raise ValueError("; ".join(f"--{name} was {was.get(name)}, now {self.settings[name]}" for name in changed))
        self.reference.load_state_dict(saved["base"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rng.bit_generator.state = saved["rng"]
        for each, state in zip(self.streams.values(), saved["streams"], strict=True):
            each.set_state(state.cpu())
        self.rollouts = saved["rollouts"] and Rollouts(**saved["rollouts"])
        self.recent, self.rows = list(saved["recent"]), list(saved["rows"])
        self.update, self.seconds = int(saved["update"]), float(saved["seconds"])
        if len(self.rows) != self.update // self.config.log_every or not 0 <= self.update <= self.config.updates:
            raise ValueError(f"{self.update} updates and {len(self.rows)} rows of the log are done; --updates asks for "
                             f"{self.config.updates}")

    def step(self, task):
        """One update; before it, a fresh batch of rollouts if the last has been used μ times."""
        self.update += 1
        c, batch_end = self.config, -(-self.update // self.config.mu) * self.config.mu        # this batch's last update
        measure = batch_end % c.log_every == 0 and c.block_size <= MAX_EXACT_BLOCK            # if that writes a line
        if (self.update - 1) % c.mu == 0:                             # θ_old = θ: the time to get the exact log π_old
            self.rollouts = collect(self.model, task, c, self.rng, *self.streams.values(),
                                    reference=self.reference if measure else None)
        self.optimizer.param_groups[0]["lr"] = c.lr * (1 - c.decay * (self.update - 1) / c.updates)
        self.recent.append(policy_update(self.model, self.optimizer, self.rollouts, c, self.streams["masks"],
                                         measure_noise=measure and self.update == batch_end))

def train(base, task, config, device):
    """Train a copy of the policy `base` (a state dict) by RL -> (model, rows of the log). Writes log.jsonl and
    checkpoint.pt every --log_every updates; with config.resume, goes on from there. TrainingFailed where a number is
    not finite. Ctrl-C ends it after the update in progress, with a checkpoint."""
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=config.resume)                # FileExistsError: never write over another run
    run, stop = Run(task, config, device, base), []
    start = time.perf_counter() - run.seconds
    run.save()
    with contextlib.ExitStack() as at_end, tqdm(
            total=config.updates, initial=run.update, desc=folder.name, leave=False) as bar:
        if threading.current_thread() is threading.main_thread():     # Ctrl-C must not interrupt an update
            at_end.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, lambda *_: stop.append(True)))
        while run.update < config.updates:
            try:
                run.step(task)
                log_now = run.update % config.log_every == 0
                reached = accuracy(run.model, task, config.block_size) if log_now else None
            except FloatingPointError as error:
                raise TrainingFailed(f"{folder.name} stopped at update {run.update}: {error}; the last good checkpoint "
                                     f"is {run.path}") from None
            bar.update()
            run.seconds = time.perf_counter() - start
            if log_now:
                run.rows.append(log_row(run.update, run.recent, reached, run.seconds))
                run.recent = []
                bar.set_postfix({name: f"{run.rows[-1][name]:.2g}" for name in ("reward", "accuracy", "ratio_max")})
            if log_now or stop:
                run.save()
            if stop:
                raise KeyboardInterrupt
    return run.model, run.rows

# ==== §9  Command line ================================================================================================
# What it teaches: every number that the reader may change, once. `Config` becomes the flags, and a log's first line.
# Most flags take several values: all combinations are run, side by side on the available cores.

HEADLINE = (("grpo", "elbo"), ("grpo", "exact"), ("stabledrl", "elbo"))  # (loss, estimator) of the main job
BASE = "task seed block_size d_model n_layer n_head base_accuracy pretrain_lr pretrain_updates bf16 compile".split()

def flag(default, text, choices=None, several=True, low=None):
    """A field of Config: its help text, whether it may take several values, and the least that is allowed."""
    return dataclasses.field(default=default, metadata=dict(text=text, choices=choices, several=several, low=low))

@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one run. A task's own `defaults` come before these; `parse` fills in what is None."""
    task: str = flag("addition", "what to learn", TASKS)
    loss: str = flag(None, "objective, §6; with --estimator alone: stabledrl", LOSSES)
    estimator: str = flag(None, "estimator of log π, §3 and §5; with --loss alone: elbo", ESTIMATORS)
    masks: str = flag("independent", "how the Monte-Carlo masks of L̂_old and L̂_θ are drawn, §3", MASKS)
    mc: int = flag(1, "K, noisy copies behind one Monte-Carlo estimate", low=1)
    per_token: bool = flag(False, "ratio to the power 1/L: divide log ρ̂, and so its gradient, by the length")
    clip_eps: float = flag(None, "ε; default 0.2 for grpo, 5 for others; norm_only, no_ratio do not clip by it", low=0)
    spikes: float = flag(0.0, "stress test: the share of log-ratios that are raised by log 1e5, at random")
    seed: int = flag(0, "random seed; every seed has a base policy of its own", low=0)
    updates: int = flag(1200, "optimiser steps of RL", low=1)
    lr: float = flag(1e-4, "learning rate of RL")
    decay: bool = flag(False, "let the learning rate of RL fall linearly, to 0 after the last update")
    prompts: int = flag(32, "prompts per batch of rollouts", low=1)
    group_size: int = flag(8, "G, completions per prompt", low=2)
    mu: int = flag(2, "μ, updates per batch of rollouts", low=1)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this; 0 = never", low=0)
    block_size: int = flag(None, "B, tokens denoised together; default: the task's own", low=1)
    d_model: int = flag(64, "width of the transformer", low=1)
    n_layer: int = flag(2, "layers of the transformer", low=1)
    n_head: int = flag(4, "attention heads per layer", low=1)
    base_accuracy: float = flag(0.4, "pretraining stops at this greedy held-out accuracy")
    pretrain_lr: float = flag(1e-3, "learning rate of pretraining")
    pretrain_updates: int = flag(2000, "pretraining fails if it needs more updates than this", low=0)
    log_every: int = flag(40, "updates per line of the log, a multiple of μ", low=1)
    device: str = flag("auto", "auto takes cuda where there is one", ("auto", "cpu", "cuda"), several=False)
    bf16: bool = flag(False, "matrix products in bfloat16; likelihoods and losses stay float32")
    compile: bool = flag(False, "torch.compile the model: may pay on a GPU, never at toy size on a CPU")
    resume: bool = flag(False, "go on with the runs whose folders exist, from their checkpoints")
    jobs: int = flag(0, "runs at a time; 0 = one for every thread of torch, or one on a GPU", several=False, low=0)
    out: str = flag("runs", "folder of the run folders, of results.jsonl, and of the figure of --plot", several=False)

def problem(config):
    """What is wrong with a Config, in one line that says what would be right, or None."""
    c, task, folder = config, TASKS[config.task], run_folder(config)
    for field in dataclasses.fields(Config):
        low, value = field.metadata["low"], getattr(c, field.name)
        if low is not None and not low <= value < 2**32:              # NaN and infinity fail this as well
            return f"--{field.name} must be at least {low} and below 2^32 (got {value})"
    copies = max(c.mc, 2**c.block_size - 1 if c.block_size <= MAX_EXACT_BLOCK else 1)
    tokens = c.prompts * c.group_size * (task.prompt_len + (1 + copies) * task.completion_len)
    rules = (
        (0 < c.lr <= 1 and 0 < c.pretrain_lr <= 1, "--lr and --pretrain_lr must be positive and at most 1"),
        (tokens <= 2**24 and 12 * c.d_model**2 * c.n_layer <= 2**32, "this needs too much memory: --prompts × "
         "--group_size × tokens and copies is at most 2^24, and 12 × --d_model² × --n_layer at most 2^32"),
        (c.out.strip(), "--out must name a folder"),
        (0 <= c.base_accuracy <= 1 and 0 <= c.spikes <= 1, "--base_accuracy and --spikes must be from 0 to 1"),
        (c.masks != "coupled" or c.mc % 2 == 0, f"--masks coupled needs an even --mc or other --masks (got {c.mc})"),
        (c.d_model % (2 * c.n_head) == 0, f"--d_model must be a multiple of 2·--n_head (got {c.d_model}, {c.n_head})"),
        (task.prompt_len % c.block_size == task.completion_len % c.block_size == 0, "--block_size must divide both "
         f"lengths of {task.name}, {task.prompt_len} and {task.completion_len} (got {c.block_size})"),
        (c.block_size <= MAX_EXACT_BLOCK or "exact" not in c.estimator, f"--estimator {c.estimator} needs 2^B - 1 "
         f"noisy copies: --block_size at most {MAX_EXACT_BLOCK} (got {c.block_size})"),
        (c.updates % c.log_every == c.log_every % c.mu == 0, f"--updates must be a multiple of --log_every, and "
         f"--log_every one of --mu (got {c.updates}, {c.log_every}, {c.mu})"),
        (c.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is no CUDA device; use --device cpu"),
        (c.jobs < 2 or (sys.platform == "linux" and c.device == "cpu"), "--jobs above 1 needs Linux and --device cpu"),
        (c.resume or not os.path.lexists(folder), f"{folder} already exists: --resume it, or choose another --out"),
        (os.path.lexists(folder / "checkpoint.pt") or not os.path.lexists(folder / "log.jsonl"),
         f"{folder} has a log, but no checkpoint.pt to resume from: move it away, or choose another --out"),
    )
    return next((message for holds, message in rules if not holds), None)

def parse(argv=None):
    """Command line -> list of Config, one per run (seeds outermost), all checked. Exits with status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="stabledrl.py", allow_abbrev=False, description="RL for a block-diffusion "
                                     "language model. Without flags: the main job, GRPO against StableDRL.")
    parser.error = lambda message: parser.exit(2, f"stabledrl.py: error: {' '.join(message.split())}\n")
    parser.add_argument("--plot", nargs="+", metavar="RUN", help="only draw the logs of run folders, to OUT/plot.svg")
    for field in dataclasses.fields(Config):
        meta = field.metadata
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {
            "type": field.type, "choices": meta["choices"], "nargs": "+" if meta["several"] else None}
        text = meta["text"] + ("" if field.default in (None, False) else f" (default {field.default})")
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    folders, out = given.pop("plot"), given.pop("out", Config.out)
    if folders:
        try:
            plot(folders, Path(out))
            parser.exit()
        except (OSError, ValueError, ImportError) as error:
            parser.error(f"--plot: {error}{'; pip install matplotlib' * isinstance(error, ImportError)}")
    policies = list(itertools.product(given.pop("loss", ["stabledrl"]), given.pop("estimator", ["elbo"]))) \
        if given.keys() & {"loss", "estimator"} else HEADLINE
    given["device"] = given.get("device", "auto").replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    grid = {name: values if isinstance(values, list) else [values] for name, values in {"seed": 0, **given}.items()}
    configs = []
    for values, (loss, estimator) in itertools.product(itertools.product(*grid.values()), policies):
        setting = dict(zip(grid, values))
        task = TASKS[setting.get("task", Config.task)]
        varied = [f"{name}{setting[name]}" for name in grid if len(grid[name]) > 1 and name not in ("task", "seed")]
        configs.append(Config(**{
            "block_size": task.block_size, "clip_eps": LOSSES[loss][1], **task.defaults, **setting, "loss": loss,
            "estimator": estimator, "out": out and str(Path(out, "-".join(varied)))}))
        if wrong := problem(configs[-1]):
            parser.error(wrong)
        if os.path.lexists(run_folder(configs[-1]) / "checkpoint.pt"):
            try:
                Run(task, configs[-1], configs[-1].device)
            except ValueError as error:
                parser.error(f"--resume: {error}")
    if len(set(configs)) < len(configs):
        parser.error("a flag names a value twice: every value once, please")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        open(Path(out, "results.jsonl"), "a").close()                 # can a file be written there?
    except OSError as error:
        parser.error(f"--out: {error}")
    return configs

def parallel(function, calls, jobs):
    """[function(*call) for call in calls], plainly, or `jobs` at a time, each in a forked process with its share of the
    threads, which ends if this one does. A str stands for the result of a process that died. Ctrl-C is passed on."""
    if jobs == 1:
        return [function(*call) for call in calls]
    fork, threads = multiprocessing.get_context("fork"), max(1, torch.get_num_threads() // jobs)
    def _child(pipe, slot, call):
        signal.signal(signal.SIGINT, signal.SIG_DFL)                  # only `train` has something to save
        threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
        torch.set_num_threads(threads)
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, position=slot)
        with contextlib.suppress(KeyboardInterrupt):
            pipe.send_bytes(pickle.dumps(function(*call)))
    results, running, waiting = [None] * len(calls), {}, list(range(len(calls)))[::-1]
    with tqdm(total=len(calls), desc="all", position=jobs, leave=False) as bar, contextlib.ExitStack() as at_end:
        at_end.callback(lambda: [(os.kill(p.pid, signal.SIGINT), p.join()) for _, p in running.values()])
        while waiting or running:
            while waiting and len(running) < jobs:
                i, (receive, send) = waiting.pop(), fork.Pipe(duplex=False)
                (process := fork.Process(target=_child, args=(send, i % jobs, calls[i]))).start()
                running[receive] = i, process
                send.close()                                          # so that the child's end is the only one
            for pipe in multiprocessing.connection.wait(running):
                i, _ = running[pipe]
                try:
                    results[i] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    results[i] = f"{function.__name__}: process {i + 1} of {len(calls)} ended before it was done"
                running.pop(pipe)[1].join()
                bar.update()
    return results

def labels(runs):
    """What tells runs (dicts of their settings) apart, seeds aside -> a str for each, for tables and figures."""
    kinds = [(run["task"], run["loss"], run["estimator"]) for run in runs]      # a name adds what varies within a kind
    names = [field.name for field in dataclasses.fields(Config) if field.name not in ("seed", "out", "resume", "jobs")]
    varied = [name for name in names[3:] if len({(k, run[name]) for k, run in zip(kinds, runs)}) > len(set(kinds))]
    first = 0 if len({task for task, *_ in kinds}) > 1 else 1
    return [" / ".join((*k[first:], *(f"{name} {run[name]}" for name in varied))) for k, run in zip(kinds, runs)]

def summary(config, base_reward, rows):
    """A run in one flat dict: its settings, then what the tables need. It becomes a line of results.jsonl."""
    reward, noise = ([row[name] for row in rows if row[name] is not None] for name in ("reward", "noise_std"))
    return {name: value for name, value in vars(config).items() if name not in ("out", "resume", "jobs")} | {
        "base reward": base_reward, "final reward": float(np.mean(reward[-max(1, len(rows) // 10) :])),
        "accuracy": rows[-1]["accuracy"], "largest ratio": max(row["ratio_max"] for row in rows),
        "noise (nats)": float(np.mean(noise)) if noise else None, "seconds": rows[-1]["seconds"]}

def report(results):
    """Results of runs (`summary`) -> table over their seeds and verdict, as lines. Every word is computed."""
    columns = ("base reward", "final reward", "times the base", "accuracy", "largest ratio", "noise (nats)")
    results = [{**run, "times the base": run["final reward"] / max(run["base reward"], 1e-9)} for run in results]
    names, gain, words = labels(results), {}, []
    width = max([18, *(len(name) + 2 for name in names)])
    lines = [f"{'policy':>{width}}" + "".join(f"{title:>16}" for title in columns)]
    for name in dict.fromkeys(names):
        runs = np.array([[run[column] for column in columns] for run, own in zip(results, names) if own == name], "d")
        several, gain[name] = len(runs) > 1, runs[:, 2].mean()
        means, stds = runs.mean(0), runs.std(0, ddof=int(several))
        cells = [f"{m:.0e}" if m > 1e3 else f"{m:.3f}" + f" ± {s:.3f}" * several for m, s in zip(means, stds)]
        lines.append("".join([f"{name:>{width}}", *(f"{cell:>16}" for cell in cells)]))
        words.append(f"{name}: {' / '.join(f'{times:.2f}' for times in runs[:, 2])} times the base")
    if {"grpo / elbo", "grpo / exact"} <= set(gain):
        shown = "So" if gain["grpo / elbo"] < 0.9 and gain["grpo / exact"] > 1.1 else "It is not shown that"
        words.append(f"{shown} the estimate is the cause: compare GRPO on the estimated ratio and on the exact one.")
    return [*lines, "", *words]

def plot(folders, out):
    """Draw the logs of run folders to out/plot.svg: a line per setting, the mean over its seeds, in a band of one
    standard deviation. ValueError for a folder without a readable log."""
    import matplotlib.pyplot as plt
    panels = ("update", "reward", "log10 ratio_max", "log10 grad_norm", "noise_std", "drift")
    configs, logs = [], []
    for path in dict.fromkeys(Path(folder).resolve() for folder in folders):
        try:
            config, *rows = [json.loads(line) for line in open(path / "log.jsonl")]
            labels([config])
            log = np.array([[row[name.split()[-1]] for name in panels] for row in rows], dtype=float).reshape(-1, 6)
        except UNREADABLE as error:
            raise ValueError(f"{path} holds no readable log.jsonl of a run ({error!r})") from None
        log[:, 2:4] = np.log10(np.maximum(log[:, 2:4], 1e-9))
        configs, logs = [*configs, config], [*logs, log]
    names, colours = labels(configs), "#D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #000000".split()
    styles = zip(itertools.cycle(("-", "--", "-.", ":")), itertools.cycle(colours))  # differ in print as well
    plt.rcParams["svg.hashsalt"] = "stabledrl"                        # the same logs give the same file
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.5), layout="constrained")
    for name, (style, colour) in zip(dict.fromkeys(names), styles):
        seeds = [log for log, own in zip(logs, names) if own == name]
        seeds = np.array([log[: min(map(len, seeds))] for log in seeds])        # (seeds, length of the shortest, 6)
        mean, std = seeds.mean(0).T, seeds.std(0, ddof=int(len(seeds) > 1)).T
        for axis, title, y, band in zip(axes, panels[1:], mean[1:], std[1:]):
            axis.plot(mean[0], y, style, color=colour, label=name)
            axis.fill_between(mean[0], y - band, y + band, color=colour, alpha=0.2, linewidth=0)
            axis.set(title=title, xlabel="update")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "plot.svg", metadata={"Date": None})

def pretrained(configs):
    """The base of runs that share it, kept by a checkpoint or new -> (state dict, its reward); or a str, why not."""
    config, task = configs[0], TASKS[configs[0].task]
    begun = next((Run(task, c, c.device) for c in configs if (run_folder(c) / "checkpoint.pt").exists()), None)
    try:
        base = begun.reference if begun else pretrain(task, config, config.device)
    except (TrainingFailed, FloatingPointError) as error:
        return f"pretraining, {task.name}, seed {config.seed}: {error}"
    prompts, _ = task.sample(np.random.default_rng(0), 2000, "train")           # the reward where training curves start
    lots = stream(config, "base reward", config.device)
    reward = answer(base, task, prompts, config.block_size, generator=lots)[2].mean().item()
    print(f"base policy, {task.name}, seed {config.seed}: mean reward {reward:.3f} sampled, "
          f"accuracy {accuracy(base, task, config.block_size):.3f} greedy on held-out prompts", flush=True)
    return base.state_dict(), reward

def trained(config, base, base_reward):
    """Train one policy -> (its summary, five answers as lines); or a str, why it could not be trained to its end."""
    task, folder = TASKS[config.task], run_folder(config)
    try:
        model, rows = train(base, task, config, config.device)
    except (TrainingFailed, OSError) as error:
        return str(error) if isinstance(error, TrainingFailed) else f"{folder}: {error}; see --resume"
    print(f"{folder}: {config.updates} updates in {rows[-1]['seconds']:.0f} s", flush=True)
    prompts, _ = task.sample(np.random.default_rng(0), 5, "test")
    texts = answer(model, task, prompts, config.block_size, temperature=0.0, order="confidence")[3]
    return summary(config, base_reward, rows), ["", f"{folder.name}, answers to held-out prompts:", *(
        f"  {p}{c}  {task.explain(p, c)}" for p, c in zip(prompts, texts))]

def main(argv=None):
    """Run what the command line asks for: base policies, the policies that start from them, table, verdict and answers.
    TrainingFailed at the end if one could not be trained to its end, after all the others have run."""
    configs, groups = parse(argv), {}
    for config in configs:
        groups.setdefault(tuple(getattr(config, name) for name in BASE), []).append(config)
    cores = torch.get_num_threads() if sys.platform == "linux" and configs[0].device == "cpu" else 1
    jobs = configs[0].jobs or min(len(configs), cores)
    bases = parallel(pretrained, [(group,) for group in groups.values()], jobs)
    base_of = {config: base for group, base in zip(groups.values(), bases) for config in group}
    done = parallel(trained, [(c, *base_of[c]) for c in configs if not isinstance(base_of[c], str)], jobs)
    failures = [failure for failure in (*bases, *done) if isinstance(failure, str)]
    results = [result for result, _ in filter(lambda result: not isinstance(result, str), done)]
    answers = [line for result in done[:3] if not isinstance(result, str) for line in result[1]]
    print("", *report(results), *answers, sep="\n")
    path = Path(os.path.commonpath([config.out for config in configs]), "results.jsonl")
    lines = dict.fromkeys([*path.read_text().splitlines(), *map(json.dumps, results)])           # every run once
    path.write_text("".join(f"{line}\n" for line in lines))
    if failures:
        raise TrainingFailed("; ".join(failures))

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                          # a terminal without ± and ρ still gets the rest
    try:
        main()
    except (TrainingFailed, OSError) as error:
        sys.exit(f"stabledrl.py: {error}")
    except KeyboardInterrupt:
        sys.exit("stabledrl.py: interrupted; the same command with --resume goes on from here")
