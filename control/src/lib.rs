//! Podgate.

pub mod netlink;
