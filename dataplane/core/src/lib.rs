//! Podgate's packet pipeline, without IO.
//!
//! Bytes, an immutable [`snapshot::Snapshot`] and the time go in; a [`verdict::Verdict`] and edited bytes come out. There is no
//! socket, no clock, no lock, no allocation after construction, no logging and no `unsafe` in this crate, so everything hard
//! about a gateway (translation, checksums, fragments, expiry) is tested here with literal packets.
//!
//! The modules stand in the order in which a packet meets them; [`pipeline`] is the page to read first.
//!
//! ```
//! use podgate_core::nat;
//! use podgate_core::packet::{Ingress, Offload, Packet};
//! use podgate_core::parse::parse;
//!
//! // UDP from 10.32.1.10:40000 to the VIP 10.96.0.10:53, without a UDP checksum (RFC 768).
//! let mut bytes = [
//!     0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 10, 32, 1, 10, 10, 96, 0, 10, //
//!     0x9c, 0x40, 0, 53, 0, 8, 0, 0,
//! ];
//! let packet = Packet { head: &mut bytes, tail_len: 0, offload: Offload::default(), ingress: Ingress::Pods };
//! let parsed = parse(&packet).unwrap();
//! assert_eq!(format!("{:?}", parsed.tuple), "17 10.32.1.10:40000 > 10.96.0.10:53");
//!
//! let mut to = parsed.tuple;
//! to.dst = std::net::Ipv4Addr::new(10, 32, 2, 7).into();
//! nat::translate(packet.head, &parsed, packet.offload.checksum, &to);
//! assert_eq!(bytes[16..20], [10, 32, 2, 7]);
//! ```
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
pub mod affinity;
pub mod balance;
pub mod fib;
pub mod shape;
pub mod fold;
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
