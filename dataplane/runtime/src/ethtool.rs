//! The offloads of an interface, read and switched as `ethtool -k` and `ethtool -K` do.
//!
//! `SIOCETHTOOL` works on any socket of the interface's network namespace, so a call is made through
//! [`crate::netns::Netns::run`]. Read first: `linux/ethtool.h` (`ETHTOOL_GFEATURES`, `ETHTOOL_SFEATURES`) and, for the names,
//! `netdev_features_strings` in the kernel's `net/ethtool/common.c`.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// `SIOCETHTOOL` (`linux/sockios.h`).
const SIOCETHTOOL: libc::Ioctl = 0x8946;
/// Commands of `linux/ethtool.h`.
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
/// `ETH_SS_FEATURES`: the set of names that features have.
const STRING_SET_FEATURES: u32 = 4;
/// `ETH_GSTRING_LEN`.
const NAME_LEN: usize = 32;

/// One offload of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name, such as `tx-udp-segmentation`.
    pub name: String,
    /// Whether it is on.
    pub active: bool,
    /// Whether it can be switched.
    pub changeable: bool,
}

/// Every offload of `interface`, which lies in the calling thread's network namespace.
pub fn features(interface: &str) -> io::Result<Vec<Feature>> {
    let device = Device::open(interface)?;
    let names = device.names()?;
    // struct ethtool_gfeatures: command, number of blocks, then per block of 32: available, requested, active, never_changed.
    let blocks = names.len().div_ceil(32);
    let mut words = vec![0_u32; 2 + 4 * blocks];
    (words[0], words[1]) = (ETHTOOL_GFEATURES, blocks as u32);
    device.command(&mut words)?;
    let bit = |number: usize, kind: usize| words[2 + 4 * (number / 32) + kind] >> (number % 32) & 1 == 1;
    let feature = |(number, name)| Feature { name, active: bit(number, 2), changeable: bit(number, 0) && !bit(number, 3) };
    Ok(names.into_iter().enumerate().map(feature).filter(|feature| !feature.name.is_empty()).collect())
}

/// Switches each of `wanted` on `interface`, which lies in the calling thread's network namespace.
///
/// A name that this kernel does not have is an error, and so is one that the device did not follow (`ethtool -K` only says so).
pub fn set_features(interface: &str, wanted: &[(&str, Switch)]) -> io::Result<()> {
    let device = Device::open(interface)?;
    let names = device.names()?;
    // struct ethtool_sfeatures: command, number of blocks, then per block of 32: valid, requested.
    let blocks = names.len().div_ceil(32);
    let mut words = vec![0_u32; 2 + 2 * blocks];
    (words[0], words[1]) = (ETHTOOL_SFEATURES, blocks as u32);
    for (name, switch) in wanted {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("{interface} has no offload {name}"));
        let number = names.iter().position(|known| known == name).ok_or_else(missing)?;
        let block = 2 + 2 * (number / 32);
        words[block] |= 1 << (number % 32);
        if *switch == Switch::On {
            words[block + 1] |= 1 << (number % 32);
        }
    }
    device.command(&mut words)?;
    let found = features(interface)?;
    let followed = |(name, switch): &&(&str, Switch)| found.iter().any(|feature| feature.name == *name && feature.active == (*switch == Switch::On));
    let refused: Vec<&str> = wanted.iter().filter(|one| !followed(one)).map(|(name, _)| *name).collect();
    if refused.is_empty() {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::Unsupported, format!("{interface} does not switch {}", refused.join(", "))))
    }
}

/// How an offload is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

struct Device {
    socket: UdpSocket,
    name: [libc::c_char; libc::IFNAMSIZ],
}

impl Device {
    fn open(interface: &str) -> io::Result<Device> {
        let mut name = [0; libc::IFNAMSIZ];
        if interface.len() >= name.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{interface} is too long for an interface's name")));
        }
        for (to, from) in name.iter_mut().zip(interface.bytes()) {
            *to = from as libc::c_char;
        }
        Ok(Device { socket: UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("0.0.0.0:0"))?, name })
    }

    /// Runs the command whose structure `words` holds; the kernel writes its answer there.
    fn command(&self, words: &mut [u32]) -> io::Result<()> {
        // SAFETY: ifreq is plain data for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name = self.name;
        request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
        // SAFETY: `request` and `words` live through the call; for each command used here the kernel reads and writes exactly as many
        // words as the counts in its head say, which the callers in this file derive from the slice's length.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } {
            error if error < 0 => Err(io::Error::last_os_error()),
            // SFEATURES answers with flags for what it could not do (ETHTOOL_F_UNSUPPORTED, _WISH, _COMPAT), not with which; the caller looks.
            _ => Ok(()),
        }
    }

    /// The names of all features, in the order of their bits.
    fn names(&self) -> io::Result<Vec<String>> {
        // struct ethtool_sset_info: command, reserved, a mask of 64 bits, then one count for the one bit that we set.
        let mut info = [ETHTOOL_GSSET_INFO, 0, 0, 0, 0];
        let mask = (1_u64 << STRING_SET_FEATURES).to_ne_bytes();
        info[2] = u32::from_ne_bytes([mask[0], mask[1], mask[2], mask[3]]);
        info[3] = u32::from_ne_bytes([mask[4], mask[5], mask[6], mask[7]]);
        self.command(&mut info)?;
        let count = info[4] as usize;
        // struct ethtool_gstrings: command, set, count, then the names.
        let mut words = vec![0_u32; 3 + count * NAME_LEN / 4];
        (words[0], words[1], words[2]) = (ETHTOOL_GSTRINGS, STRING_SET_FEATURES, count as u32);
        self.command(&mut words)?;
        let bytes: Vec<u8> = words[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let text = |name: &[u8]| String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
        Ok(bytes.chunks(NAME_LEN).map(text).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_has_offloads_with_names() {
        let features = features("lo").unwrap();
        assert!(features.iter().any(|feature| feature.name == "tx-udp-segmentation"), "{features:?}");
    }

    #[test]
    fn an_offload_that_the_device_does_not_switch_is_an_error() {
        let Some(netns) = crate::testing::loopback(1500) else { return };
        let fixed = netns.run(|| features("lo")).unwrap().unwrap().into_iter().find(|feature| feature.active && !feature.changeable).unwrap();
        let error = netns.run(|| set_features("lo", &[(&fixed.name, Switch::Off)])).unwrap().unwrap_err();
        assert!(error.to_string().contains(&fixed.name), "{error}");
        netns.run(|| set_features("lo", &[("tx-udp-segmentation", Switch::Off)])).unwrap().unwrap();
    }

    #[test]
    fn a_name_that_does_not_exist_is_named_in_the_error() {
        let error = set_features("lo", &[("tx-nonsense", Switch::On)]).unwrap_err();
        assert!(error.to_string().contains("tx-nonsense"), "{error}");
    }
}
