//! The CNI plugin as a runtime meets it: the real program, with a scripted peer in the daemon's place that records what it is asked, and real
//! programs as delegated plugins. What is tested is the plugin's own contract on both sides.

mod arbitrary;
mod attachments;
mod delegated;
mod peer;
mod refusals;
mod shim;
mod table;
mod waiting;
