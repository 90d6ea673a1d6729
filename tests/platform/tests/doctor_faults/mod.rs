//! The faults, by what they are of.

pub mod bare;
pub mod cni;
pub mod daemon;
pub mod firewall;
pub mod host;
pub mod peers;
pub mod source;
