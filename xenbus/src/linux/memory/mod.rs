// SPDX-License-Identifier: GPL-2.0-only

//! Pages of this module: their allocation, their places, and how they are given back.

pub(crate) mod data;
mod mappable;
pub(crate) mod page_blocks;
pub(crate) mod pages;
pub(crate) mod pool;
pub(crate) mod shrinker;
pub(crate) mod vectors;
