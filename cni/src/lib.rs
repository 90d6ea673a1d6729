//! What passes between Podgate's daemon and its clients, and a blocking client small enough for a CNI plugin.
//!
//! A connection to the daemon's Unix socket carries one request and its response, each one line of JSON ([`protocol`]). Descriptors (the
//! network namespace to attach) travel beside the request's bytes (`SCM_RIGHTS`, unix(7)), so the daemon needs no path and no mount of
//! the caller's. The answer to an attachment is a CNI result ([`result`]).
//!
//! ```no_run
//! use podgate_cni::{Client, Request};
//!
//! let status = Client::new("/run/podgate/podgate.sock").call(&Request::Show { table: "status".into() }, &[])?;
//! println!("{status}");
//! # Ok::<(), podgate_cni::CallError>(())
//! ```
//!
//! The crate's program, `podgate-cni`, is the CNI plugin. A container runtime runs it; by hand it is asked like this:
//!
//! ```text
//! # echo '{"cniVersion": "1.1.0", "name": "podgate", "type": "podgate-cni"}' |
//! > CNI_COMMAND=ADD CNI_CONTAINERID=c1 CNI_NETNS=/run/netns/c1 CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin podgate-cni
//! {"cniVersion":"1.1.0","dns":{},"interfaces":[{"name":"veth0a1b2c3d"},{"name":"eth0","sandbox":"/run/netns/c1"}],"ips":[…],"routes":[…]}
//! ```
//!
//! It is linked statically, so that it runs on any node whatever its C library:
//!
//! ```text
//! $ cargo rustc --profile cni -p podgate-cni --bin podgate-cni -- -C target-feature=+crt-static
//! ```
#![forbid(unsafe_code)]

pub mod protocol;
pub mod result;
pub mod client;

pub use client::{CallError, Client};
pub use protocol::{Attachment, REQUEST_LEN_MAX, Request, Response};

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/podgate/podgate.sock";

/// Beside the socket: notes of detachments that were asked for while no daemon ran, each an [`Attachment`] as JSON in a file of its own
/// whose name ends in `.json`. The next daemon works them off.
pub const NOTES: &str = "detach.d";
