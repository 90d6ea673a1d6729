//! Podgate's control side: from a configuration and the cluster's objects to the tables that the workers read, and to the rules and
//! routes that bring packets to them.
//!
//! In the order in which a change passes: [`source`] watches the cluster's objects, [`model`] holds what of them matters, [`compile`]
//! makes a snapshot of it for this node. [`config`] is read once at the start; [`ipam`] gives out pods' addresses; [`netlink`] speaks to
//! the kernel.
#![forbid(unsafe_code)]

pub mod compile;
pub mod config;
pub mod demo;
pub mod gateway_ns;
pub mod host_state;
pub mod guard_drops;
pub mod ipam;
pub mod lab;
pub mod model;
pub mod netlink;
pub mod pods;
pub mod routing;
pub mod source;
