// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Tests of the real engine on a simulated machine: one program, which is linked once.

mod causes;
mod closing;
mod due;
mod given_back;
mod held;
mod hostile;
mod kept;
mod mapped;
mod mapped_negative;
mod moves;
mod moves_negative;
mod negative;
mod offers;
mod pages;
mod patience;
mod quick;
mod random;
mod shares;
mod tap;
mod tap_negative;
mod times;
mod worth;
