//! Podgate's packet pipeline, without IO.
//!
//! Bytes, an immutable [`snapshot::Snapshot`] and the time go in; a [`verdict::Verdict`] and edited bytes come out. There is no
//! socket, no clock, no lock, no allocation after construction, no logging and no `unsafe` in this crate, so everything hard
//! about a gateway (translation, checksums, fragments, expiry) is tested here with literal packets.
//!
//! The modules stand in the order in which a packet meets them; [`pipeline`] is the page to read first.
#![forbid(unsafe_code)]

pub mod pipeline;

pub mod packet;
pub mod addr;
pub mod wire;
pub mod parse;
pub mod decap;
pub mod admit;
pub mod fragment;
pub mod decide;
pub mod flow;
pub mod service;
pub mod fib;
mod fold;
pub mod nat;
pub mod icmp;
pub mod verdict;
pub mod offload;
pub mod encap;

pub mod snapshot;
pub mod counters;
pub mod trace;
#[doc(hidden)]
#[cfg(any(test, feature = "testing"))]
pub mod testing;
