// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Tests of the real engine on a simulated machine: one program, which is linked once.

mod causes;
mod closing;
mod connect_retry;
mod due;
mod given_back;
mod halt_estimator;
mod held;
mod hostile;
mod kept;
mod lent;
mod mapped;
mod mapped_negative;
mod memory_quota;
mod moves;
mod moves_negative;
mod negative;
mod offers;
mod pages;
mod poll_estimator;
mod quick;
mod random;
mod tap;
mod tap_negative;
mod times;
