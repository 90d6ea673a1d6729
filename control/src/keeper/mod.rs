//! What a gateway leaves to the one after it: its descriptors, kept open by somebody who does not end with it.
//!
//! A TUN queue and a socket hold what arrives while nobody reads them, but only as long as somebody has them open. So the gateway keeps a
//! second handle on each in its [`Store`], and the store tells whoever started the gateway to keep a third: systemd's descriptor store, or
//! where there is no systemd (in a container) the [`supervisor`]. Both speak one protocol: what is to be kept is sent with
//! `FDSTORE=1` and a name (sd_notify(3)), and the next process is started with it (sd_listen_fds(3)). In an upgrade the store's content goes
//! to a gateway that was started by somebody else, over a socket (`daemon::succession`).
//!
//! What a successor finds is not believed: whoever makes use of a descriptor looks first at what it is ([`podgate_runtime::tun::Tun::open_with`],
//! [`podgate_runtime::udp::Overlay::open`], [`crate::gateway_ns`]).

mod store;
pub mod supervisor;
pub mod wire;

pub use store::{Keeper, Store, names};
