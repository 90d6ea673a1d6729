//! The flow table's memory: a file that is mapped by the process that uses it and outlives it.
//!
//! A successor of a killed process opens the same file and finds every flow, and which client sticks to which backend (design D3). The file begins with a page that says what
//! it is: magic, layout version, sizes, the boot it is of, and the key of the table's hash. If any of this does not fit, the file is
//! made anew and the reason told: flows end then, nothing else does. Times in the records count from the boot, so a file of an earlier
//! boot is useless anyway; keep it on a tmpfs such as `/run`.
//!
//! Assumed: one process at a time. An exclusive `flock` sees to it, so that nobody can cut the file short under somebody's mapping,
//! which would be SIGBUS. For the same reason every block is allocated before the file is mapped: on a full tmpfs a hole would be
//! SIGBUS at the first write.
//!
//! Pages are mapped at once so that no packet waits for a page fault: ordinary ones at first, or what huge ones a predecessor left. The
//! runtime makes the others huge by and by ([`FlowFile::collapse`]).
//!
//! Read first: flock(2), posix_fallocate(3), mmap(2) on SIGBUS.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nix::fcntl::{Flock, FlockArg};
use podgate_core::affinity;
use podgate_core::balance::loads_for;
use podgate_core::flow::{Bucket, Fetch, FlowTable, Memory, RECORDS_MAX, Record, Recovered, layout};

mod mapping;

use mapping::{HUGE_PAGE, Mapping};

/// Raise it when the meaning of a record, a bucket of either table, a load counter or the header changes, or their order.
const LAYOUT_VERSION: u32 = 3;

const MAGIC: [u8; 16] = *b"podgate flows\r\n\0";

/// Records begin on a page of their own.
const HEADER_LEN: usize = 4096;

/// An open flow table file, mapped and locked.
#[derive(Debug)]
pub struct FlowFile {
    map: Mapping,
    /// Huge pages known to be under it.
    huge: AtomicUsize,
    /// Holds the lock.
    _file: Flock<File>,
    records: usize,
    buckets: usize,
    key: [u64; 2],
}

/// How much of a flow table's file is on huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// Huge pages known to be under it.
    pub used: usize,
    /// Those that there is room for; what is left is less than one.
    pub room: usize,
    /// Bytes of one.
    pub bytes: usize,
}

/// What was found at the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// Nothing: the table is new.
    Fresh,
    /// A predecessor's table: its flows go on.
    Recovered(Recovered),
    /// A file that could not be used: the table is new.
    Replaced(ReplacedReason),
}

/// Why a file was made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplacedReason {
    /// It does not begin with what such a file begins with, or its header's checksum is wrong.
    #[error("it is not a flow table, or its header is damaged")]
    Header,
    /// Its header is whole but its length is not what the header says.
    #[error("it is {found} bytes long instead of {expected}")]
    Length {
        /// Its length.
        found: u64,
        /// What its header promises.
        expected: u64,
    },
    /// Another release wrote it.
    #[error("it is of another release: layout {found}, this one writes {LAYOUT_VERSION}")]
    Layout {
        /// Its layout version.
        found: u32,
    },
    /// The machine was started anew since.
    #[error("it is of an earlier boot")]
    Boot,
    /// The configured capacity is another now.
    #[error("its capacity is {found} flows and {wanted} are configured now")]
    Capacity {
        /// Its capacity.
        found: u64,
        /// What is wanted.
        wanted: u64,
    },
}

/// Why there is no flow table.
#[derive(Debug, thiserror::Error)]
pub enum FlowFileError {
    /// A number of flows that no table can have.
    #[error("a flow table cannot hold {0} flows: configure 1 to {max}", max = u32::MAX - 1)]
    Capacity(usize),
    /// Another process has the file.
    #[error("the flow table {0} is in use by another process: stop that gateway first")]
    InUse(PathBuf),
    /// The file system is full.
    #[error("no space for the flow table {path}: it needs {needed} bytes on that file system; free some, or configure fewer flows")]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Its length.
        needed: u64,
    },
    /// Anything else, with the step that failed.
    #[error("flow table {path}: {step} failed: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl FlowFile {
    /// Opens the table at `path` for `capacity` flows, or makes it. The directory must exist.
    pub fn open(path: impl AsRef<Path>, capacity: usize) -> Result<(FlowFile, Opened), FlowFileError> {
        let path = path.as_ref();
        let failed = |step| move |source: io::Error| FlowFileError::Io { path: path.to_owned(), step, source };
        if !(1..=RECORDS_MAX).contains(&capacity) {
            return Err(FlowFileError::Capacity(capacity));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)
            .map_err(failed("opening it"))?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::Error::EWOULDBLOCK => FlowFileError::InUse(path.to_owned()),
            _ => failed("locking it")(errno.into()),
        })?;
        file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(failed("setting its mode"))?;

        let (records, buckets) = layout(capacity);
        let boot = boot_id().map_err(failed("reading /proc/sys/kernel/random/boot_id"))?;
        let found = Header::read(&file).map_err(failed("reading it"))?;
        let len = file.metadata().map_err(failed("measuring it"))?.len();
        let (header, opened) = match found.fitting(len, records, boot) {
            Ok(header) => (header, None),
            Err(reason) => {
                let header = Header {
                    version: LAYOUT_VERSION,
                    records: records as u64,
                    buckets: buckets as u64,
                    boot,
                    key: random_key().map_err(failed("drawing a key"))?,
                };
                file.set_len(0).map_err(failed("emptying it"))?;
                (header, Some(if len == 0 { Opened::Fresh } else { Opened::Replaced(reason) }))
            }
        };
        // Also for a file that was found: a copy of one may have holes. Allocated blocks are left as they are.
        if let Err(errno) = nix::fcntl::posix_fallocate(file.as_fd(), 0, header.file_len() as libc::off_t) {
            if opened.is_some() {
                // What was allocated so far is of no use to anybody. That this fails too changes nothing.
                let _ = file.set_len(0);
            }
            return Err(match errno {
                nix::Error::ENOSPC | nix::Error::EDQUOT | nix::Error::EFBIG => {
                    FlowFileError::NoSpace { path: path.to_owned(), needed: header.file_len() }
                }
                _ => failed("allocating it")(errno.into()),
            });
        }
        if opened.is_some() {
            // Last, so that a file whose making was cut short is none.
            file.write_all_at(&header.encode(), 0).map_err(failed("writing its header"))?;
        }
        let map = Mapping::new(&file, header.file_len() as usize).map_err(failed("mapping it"))?;
        let flows = FlowFile { map, huge: AtomicUsize::new(0), _file: file, records, buckets, key: header.key };
        let opened = opened.unwrap_or_else(|| Opened::Recovered(flows.table().recover()));
        Ok((flows, opened))
    }

    /// How much of it is on huge pages.
    pub fn huge_pages(&self) -> HugePages {
        // Relaxed: a number for people.
        HugePages { used: self.huge.load(Ordering::Relaxed), room: self.map.huge_pages(), bytes: HUGE_PAGE }
    }

    /// Puts the `n`th 2 MiB of it on a huge page. Once for each `n`: those that were already are found to be and counted. It allocates the page
    /// before it gives the ordinary ones back, and the file is whole from the start, so it does not grow.
    ///
    /// # Panics
    ///
    /// If `n` is not less than [`HugePages::room`].
    pub fn collapse(&self, n: usize) -> io::Result<()> {
        self.map.collapse(n)?;
        self.huge.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The table in it.
    pub fn table(&self) -> FlowTable<'_> {
        let base = self.map.base();
        let (affinity_len, loads_len) = (affinity::buckets_for(self.records), loads_for(self.records));
        // SAFETY: the mapping is shared and writable, page-aligned and as long as the header and the four slices together (`file_len`;
        // `open` asked for that length, allocated it, and the lock keeps every other gateway from cutting it), so all slices are
        // within it and aligned to 64 bytes: what stands before each is a multiple of that. They are made of atomics alone, for which
        // any bits are a value and shared changes are allowed. They live as long as the mapping, which `self` owns.
        let memory = unsafe {
            let records = base.add(HEADER_LEN);
            let buckets = records.add(self.records * size_of::<Record>());
            let affinity = buckets.add(self.buckets * size_of::<Bucket>());
            let loads = affinity.add(affinity_len * size_of::<affinity::Bucket>());
            Memory {
                records: std::slice::from_raw_parts(records.cast::<Record>(), self.records),
                buckets: std::slice::from_raw_parts(buckets.cast::<Bucket>(), self.buckets),
                affinity: std::slice::from_raw_parts(affinity.cast::<affinity::Bucket>(), affinity_len),
                loads: std::slice::from_raw_parts(loads.cast::<AtomicU64>(), loads_len),
            }
        };
        FlowTable::new(self.key, memory)
    }
}

/// A [`Fetch`] that waits for nothing: the processor's own instruction.
#[derive(Debug)]
pub enum Prefetch {}

impl Fetch for Prefetch {
    #[inline]
    fn fetch(word: &AtomicU64) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, for any address; no memory is accessed as far as the program can tell.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(std::ptr::from_ref(word).cast());
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above (Arm ARM C6.2, PRFM).
        unsafe {
            std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) std::ptr::from_ref(word), options(nostack, preserves_flags, readonly));
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        podgate_core::flow::Touch::fetch(word);
    }
}

/// What the first page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    version: u32,
    records: u64,
    buckets: u64,
    boot: [u8; BOOT_ID_LEN],
    key: [u64; 2],
}

/// A UUID as text.
const BOOT_ID_LEN: usize = 36;
const ENCODED_LEN: usize = MAGIC.len() + 2 * 4 + 2 * 8 + 2 * 8 + BOOT_ID_LEN + 8;

/// A header, or why there is none.
struct Found(Result<Header, ReplacedReason>);

impl Header {
    fn file_len(&self) -> u64 {
        let records = self.records as usize;
        let beside = affinity::buckets_for(records) * size_of::<affinity::Bucket>() + loads_for(records) * size_of::<AtomicU64>();
        HEADER_LEN as u64 + self.records * size_of::<Record>() as u64 + self.buckets * size_of::<Bucket>() as u64 + beside as u64
    }

    /// In the machine's byte order: the file never leaves it.
    fn encode(&self) -> [u8; ENCODED_LEN] {
        let mut bytes = Vec::with_capacity(ENCODED_LEN);
        bytes.extend(MAGIC);
        bytes.extend(self.version.to_ne_bytes());
        bytes.extend(record_sizes().to_ne_bytes());
        bytes.extend(self.records.to_ne_bytes());
        bytes.extend(self.buckets.to_ne_bytes());
        bytes.extend(self.key.iter().flat_map(|word| word.to_ne_bytes()));
        bytes.extend(self.boot);
        bytes.extend(fnv1a(&bytes).to_ne_bytes());
        bytes.try_into().expect("the fields add up to ENCODED_LEN")
    }

    fn decode(bytes: &[u8; ENCODED_LEN]) -> Result<Header, ReplacedReason> {
        let (body, checksum) = bytes.split_at(ENCODED_LEN - 8);
        if body[..MAGIC.len()] != MAGIC || checksum != fnv1a(body).to_ne_bytes() {
            return Err(ReplacedReason::Header);
        }
        let word = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().expect("eight bytes"));
        let version = word(MAGIC.len()).to_ne_bytes();
        let [version, sizes] = [&version[..4], &version[4..]].map(|half| u32::from_ne_bytes(half.try_into().expect("four bytes")));
        if version != LAYOUT_VERSION || sizes != record_sizes() {
            return Err(ReplacedReason::Layout { found: version });
        }
        let at = MAGIC.len() + 8;
        Ok(Header {
            version,
            records: word(at),
            buckets: word(at + 8),
            key: [word(at + 16), word(at + 24)],
            boot: body[at + 32..].try_into().expect("what is left is the boot id"),
        })
    }

    fn read(file: &File) -> io::Result<Found> {
        let mut bytes = [0; ENCODED_LEN];
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(Found(Header::decode(&bytes))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Found(Err(ReplacedReason::Header))),
            Err(error) => Err(error),
        }
    }
}

impl Found {
    /// The header, if the file is whole, of this boot and of the wanted capacity.
    fn fitting(self, len: u64, records: usize, boot: [u8; BOOT_ID_LEN]) -> Result<Header, ReplacedReason> {
        let header = self.0?;
        if header.boot != boot {
            return Err(ReplacedReason::Boot);
        }
        if header.records != records as u64 || header.buckets != layout(records).1 as u64 {
            return Err(ReplacedReason::Capacity { found: header.records, wanted: records as u64 });
        }
        if len != header.file_len() {
            return Err(ReplacedReason::Length { found: len, expected: header.file_len() });
        }
        Ok(header)
    }
}

/// Both sizes in one word, so that a change of either is seen even if the version was forgotten.
fn record_sizes() -> u32 {
    (size_of::<Record>() as u32) << 16 | size_of::<Bucket>() as u32
}

fn boot_id() -> io::Result<[u8; BOOT_ID_LEN]> {
    let text = fs::read("/proc/sys/kernel/random/boot_id")?;
    text.first_chunk().copied().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn random_key() -> io::Result<[u64; 2]> {
    let mut bytes = [0u8; 16];
    // SAFETY: the kernel writes at most 16 bytes to the live array.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    // Up to 256 bytes come whole or not at all (getrandom(2)).
    if got != bytes.len() as isize {
        return Err(io::Error::last_os_error());
    }
    let (low, high) = bytes.split_at(8);
    Ok([low, high].map(|half| u64::from_ne_bytes(half.try_into().expect("eight bytes"))))
}

/// FNV-1a, 64 bits: enough against damage; against malice the file's mode helps.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use podgate_core::addr::{Addr, Tuple};
    use podgate_core::affinity::{BackendId, Visit};
    use podgate_core::balance::LoadSlot;
    use podgate_core::flow::{Kind, NewFlow, Now, Opener};
    use podgate_core::verdict::WorkerId;

    use super::*;

    /// A directory that goes away with the test.
    struct Directory(PathBuf);

    impl Directory {
        fn new(test: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("podgate-flows-{}-{test}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Directory(path)
        }

        fn file(&self) -> PathBuf {
            self.0.join("flows")
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn tuple(number: u16) -> Tuple {
        let (src, dst) = (Addr::from_v4([10, 0, 0, 1]), Addr::from_v4([10, 96, 0, 1]));
        Tuple { src, dst, src_port: number, dst_port: 80, protocol: 6 }
    }

    fn insert(flows: &FlowFile, numbers: std::ops::Range<u16>) {
        let table = flows.table();
        let mut cursor = table.cursor(WorkerId(0), 1);
        for number in numbers {
            let reply = Tuple { src: Addr::from_v4([10, 0, 0, 9]), dst: tuple(0).src, src_port: 8080, dst_port: number, protocol: 6 };
            let new = NewFlow { original: tuple(number), reply, kind: Kind::Service, opener: Opener::Pod, service: 7, load: LoadSlot::NONE };
            table.insert(&new, WorkerId(0), Now(1000), &mut cursor).unwrap();
        }
    }

    #[test]
    fn flows_and_sticking_clients_are_found_by_a_successor() {
        let directory = Directory::new("successor");
        let (flows, opened) = FlowFile::open(directory.file(), 1000).unwrap();
        assert_eq!(opened, Opened::Fresh);
        insert(&flows, 1..500);
        let visit = Visit { client: tuple(0).src, service: 7, timeout: std::time::Duration::from_secs(10), now: Now(1000) };
        flows.table().affinity().stick(&visit, BackendId::new(visit.client, 8080), WorkerId(0), |_| true);
        drop(flows);
        let (flows, opened) = FlowFile::open(directory.file(), 1000).unwrap();
        assert_eq!(opened, Opened::Recovered(Recovered { live: 499, unfinished: 0, discarded: 0 }));
        let sticky = flows.table().affinity().lookup(visit.client, visit.service, visit.now).expect("a client that came before");
        assert_eq!((sticky.backend, sticky.left_s), (BackendId::new(visit.client, 8080), 10));
        let flow = flows.table().lookup(&tuple(77)).unwrap();
        assert_eq!((flow.service, flow.reply.dst_port), (7, 77));
        assert_eq!(flows.table().lookup(&tuple(500)), None);
        assert_eq!(fs::metadata(directory.file()).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_that_does_not_fit_is_replaced_and_the_reason_told() {
        let directory = Directory::new("replaced");
        let path = directory.file();
        let damage = |f: &dyn Fn(&File)| {
            let (flows, _) = FlowFile::open(&path, 100).unwrap();
            if flows.table().is_empty() {
                insert(&flows, 1..10);
            }
            drop(flows);
            f(&OpenOptions::new().write(true).read(true).open(&path).unwrap());
            let (flows, opened) = FlowFile::open(&path, 100).unwrap();
            assert!(flows.table().is_empty());
            match opened {
                Opened::Replaced(reason) => reason,
                other => panic!("{other:?}"),
            }
        };
        let rewrite = |file: &File, change: &dyn Fn(&mut Header)| {
            let mut header = Header::read(file).unwrap().0.unwrap();
            change(&mut header);
            file.write_all_at(&header.encode(), 0).unwrap();
        };
        assert_eq!(damage(&|file| file.write_all_at(b"x", 3).unwrap()), ReplacedReason::Header);
        assert_eq!(damage(&|file| file.write_all_at(&[0xff; 4], 40).unwrap()), ReplacedReason::Header);
        assert_eq!(damage(&|file| file.set_len(50).unwrap()), ReplacedReason::Header);
        let reason = damage(&|file| file.set_len(5000).unwrap());
        assert!(matches!(reason, ReplacedReason::Length { found: 5000, .. }), "{reason}");
        assert_eq!(damage(&|file| rewrite(file, &|header| header.version = 99)), ReplacedReason::Layout { found: 99 });
        assert_eq!(damage(&|file| rewrite(file, &|header| header.boot[0] ^= 1)), ReplacedReason::Boot);
        let (_, opened) = FlowFile::open(&path, 200).unwrap();
        assert_eq!(opened, Opened::Replaced(ReplacedReason::Capacity { found: 100, wanted: 200 }));
    }

    #[test]
    fn flows_stay_while_their_memory_becomes_huge_pages_and_a_successor_has_them_too() {
        // A tmpfs on every Linux, which the temporary directory need not be.
        let path = PathBuf::from(format!("/dev/shm/podgate-flows-{}-huge", std::process::id()));
        let (flows, _) = FlowFile::open(&path, 60_000).unwrap();
        insert(&flows, 1..60_000);
        let (room, before) = (flows.huge_pages().room, allocated(&path));
        assert!(room >= 4, "{room}");
        let refused = (0..room).map(|n| flows.collapse(n)).find_map(Result::err);
        let found = |flows: &FlowFile| (1..60_000).filter(|n| flows.table().lookup(&tuple(*n)).is_some()).count();
        assert_eq!(found(&flows), 59_999);
        assert_eq!(allocated(&path), before);
        let used = flows.huge_pages().used;
        match refused {
            Some(error) => eprintln!("skipped: {error}"),
            None => assert_eq!((used, huge_bytes(&path)), (room, room * HUGE_PAGE)),
        }
        drop(flows);
        let (flows, opened) = FlowFile::open(&path, 60_000).unwrap();
        let kept = huge_bytes(&path);
        fs::remove_file(&path).unwrap();
        assert_eq!((found(&flows), opened), (59_999, Opened::Recovered(Recovered { live: 59_999, unfinished: 0, discarded: 0 })));
        assert_eq!(kept, used * HUGE_PAGE);
    }

    /// Bytes that the file system has for it.
    fn allocated(path: &Path) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512
    }

    /// Bytes of a file on a tmpfs that this process has mapped by huge pages.
    fn huge_bytes(path: &Path) -> usize {
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut of_file = maps.lines().skip_while(|line| !line.ends_with(path.to_str().unwrap()));
        let kib = of_file.find_map(|line| line.strip_prefix("ShmemPmdMapped:")).unwrap();
        kib.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    #[test]
    fn two_at_once_are_refused() {
        let directory = Directory::new("twice");
        let (_flows, _) = FlowFile::open(directory.file(), 10).unwrap();
        assert!(matches!(FlowFile::open(directory.file(), 10), Err(FlowFileError::InUse(_))));
        assert!(matches!(FlowFile::open(directory.file(), 0), Err(FlowFileError::Capacity(0))));
    }

    #[test]
    fn keys_differ_and_a_symbolic_link_is_not_followed() {
        let directory = Directory::new("keys");
        let (first, _) = FlowFile::open(directory.file(), 10).unwrap();
        let (second, _) = FlowFile::open(directory.0.join("other"), 10).unwrap();
        assert_ne!(first.key, second.key);
        std::os::unix::fs::symlink(directory.file(), directory.0.join("link")).unwrap();
        assert!(matches!(FlowFile::open(directory.0.join("link"), 10), Err(FlowFileError::Io { step: "opening it", .. })));
    }

    #[test]
    fn a_full_file_system_is_an_error_and_not_a_signal() {
        use nix::mount::{MsFlags, mount};
        let directory = Directory::new("full");
        // A mount namespace of this thread's own, so that the tmpfs goes away with it.
        let tried = std::thread::scope(|scope| {
            let small = || -> nix::Result<Result<(FlowFile, Opened), FlowFileError>> {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
                mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
                mount(Some("tmpfs"), &directory.0, Some("tmpfs"), MsFlags::empty(), Some("size=256k"))?;
                Ok(FlowFile::open(directory.file(), 10_000))
            };
            scope.spawn(small).join().unwrap()
        });
        match tried {
            Err(errno) => eprintln!("skipped: {errno}"),
            Ok(opened) => assert!(matches!(opened, Err(FlowFileError::NoSpace { needed: 1_280_000.., .. })), "{opened:?}"),
        }
    }
}
