//! What the process must be allowed to do, asked before anything is touched.
//!
//! Without this, a missing capability shows as `EPERM` from whichever call happens to need it first.

/// A capability: its name and its number (`include/uapi/linux/capability.h`).
type Capability = (&'static str, u32);

/// `CAP_NET_ADMIN` is for links, routes, rules and TUNs; `CAP_SYS_ADMIN` for entering and mounting network namespaces.
const NEEDED: [Capability; 2] = [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21)];

/// The process lacks a capability.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this process (user {user}) lacks {missing}: run it as root; in a container or a systemd unit, grant it (securityContext.capabilities.add, \
     AmbientCapabilities)"
)]
pub struct Missing {
    user: u32,
    missing: String,
}

/// Whether this process may do what a gateway does to the network.
pub fn check() -> Result<(), Missing> {
    // Where /proc cannot be read, the calls themselves will tell.
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return Ok(()) };
    match missing(&status) {
        None => Ok(()),
        Some(missing) => Err(Missing { user: nix::unistd::geteuid().as_raw(), missing }),
    }
}

/// `/proc/sys` cannot be written.
#[derive(Debug, thiserror::Error)]
#[error(
    "/proc/sys is mounted read-only here and cannot be made writable ({0}): in a container, grant CAP_SYS_ADMIN and an unconfined AppArmor \
     profile (securityContext.appArmorProfile), or run it privileged; in a unit, say ProtectKernelTunables=no"
)]
pub struct ReadOnly(nix::Error);

/// Makes `/proc/sys` writable in this process's mount namespace; whether that was needed. Container runtimes mount it read-only over itself
/// in every container that is not privileged, and a gateway sets the sysctls of its interfaces, which are few and are put back.
pub fn open_sysctls() -> Result<bool, ReadOnly> {
    use nix::mount::{MsFlags, mount};
    use nix::sys::statvfs::{FsFlags, statvfs};
    const PATH: &str = "/proc/sys";
    if !statvfs(PATH).is_ok_and(|found| found.flags().contains(FsFlags::ST_RDONLY)) {
        return Ok(false);
    }
    // mount(2): with MS_BIND this changes the flags of this mount alone, not of the file system.
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(None::<&str>, PATH, None::<&str>, flags, None::<&str>).map_err(ReadOnly)?;
    Ok(true)
}

/// The names of what is missing from the effective set (proc_pid_status(5), `CapEff`).
fn missing(status: &str) -> Option<String> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(effective.trim(), 16).ok()?;
    let names: Vec<&str> = NEEDED.iter().filter(|(_, number)| effective & (1 << number) == 0).map(|(name, _)| *name).collect();
    (!names.is_empty()).then(|| names.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::missing;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing("Name:\tpodgate\nCapEff:\t0000000000000000\n").as_deref(), Some("CAP_NET_ADMIN and CAP_SYS_ADMIN"));
        assert_eq!(missing("CapEff:\t0000000000001000\n").as_deref(), Some("CAP_SYS_ADMIN"));
        assert_eq!(missing("CapEff:\t000001ffffffffff\n"), None);
        assert_eq!(missing("a kernel that says nothing of it\n"), None);
    }
}
