// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The tests of `xenbus::proto`: the state machine, the frontend's keys, numbers and names.

mod keys;
mod machine;
mod model;
mod publish;
mod sequences;
mod text;
mod watched;
