//! A file in memory, on huge pages where the kernel puts them under it.
//!
//! A table of a million flows has 60,000 ordinary pages, and a processor remembers where some two thousand are; of huge ones it has 116. A tmpfs gives
//! those by its mount (`huge=`) or the administrator's leave (`shmem_enabled`), or one by one to whoever asks (`MADV_COLLAPSE`, Linux 6.1),
//! whatever those say: the kernel copies the contents to a huge page and puts that into the file, which keeps it for the next process.
//!
//! Read first: madvise(2), the kernel's `Documentation/admin-guide/mm/transhuge.rst`, and `collapse_file` in its `mm/khugepaged.c`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, null_mut};

/// Bytes of a huge page, on every architecture with pages of 4 KiB.
pub(super) const HUGE_PAGE: usize = 2 << 20;

/// A whole file, shared and writable, mapped from a multiple of [`HUGE_PAGE`] on.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: what is mapped belongs to the process, and no thread has more right to it than another; who reads and writes there agrees on
// it by atomics (`FlowFile::table`).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The first `len` bytes of `file`, which has them, with every page at hand. `len` is not 0.
    pub fn new(file: &File, len: usize) -> io::Result<Mapping> {
        let room = len.checked_next_multiple_of(HUGE_PAGE).and_then(|len| len.checked_add(HUGE_PAGE)).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping where the kernel has room, of nothing: no memory of anybody's is touched.
        let reserved = unsafe { libc::mmap(null_mut(), room, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let (start, end) = (reserved as usize, reserved as usize + room);
        let base = start.next_multiple_of(HUGE_PAGE);
        let wanted = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        // SAFETY: it takes the place of a part of what was just reserved, and of nothing else.
        let mapped = unsafe { libc::mmap(base as *mut libc::c_void, len, wanted, flags, file.as_raw_fd(), 0) };
        let error = io::Error::last_os_error();
        let used = if mapped == libc::MAP_FAILED { start..start } else { base..base + len.next_multiple_of(page_size()) };
        for (from, to) in [(start, used.start), (used.end, end)] {
            if from < to {
                // SAFETY: what is left of the reservation, that nobody knows of. A failure leaves addresses unused, and nothing else.
                unsafe { libc::munmap(from as *mut libc::c_void, to - from) };
            }
        }
        match NonNull::new(mapped.cast()) {
            Some(base) if mapped != libc::MAP_FAILED => Ok(Mapping { base, len }),
            _ => Err(error),
        }
    }

    /// Where it begins: `len` bytes from there on are mapped as long as `self` lives.
    pub fn base(&self) -> *const u8 {
        self.base.as_ptr()
    }

    /// How many huge pages there is room for.
    pub fn huge_pages(&self) -> usize {
        self.len / HUGE_PAGE
    }

    /// Puts the contents of the `n`th of them on one, if they are not. It takes some two milliseconds of a processor, in which whoever needs one of
    /// the pages waits.
    pub fn collapse(&self, n: usize) -> io::Result<()> {
        assert!(n < self.huge_pages(), "huge page {n} of {}", self.huge_pages());
        // SAFETY: within the mapping, whose contents stay as they are; only the memory that holds them is another.
        let result = unsafe { libc::madvise(self.base.as_ptr().add(n * HUGE_PAGE).cast(), HUGE_PAGE, libc::MADV_COLLAPSE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and borrowed by nobody any more. A failure leaves it mapped.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

fn page_size() -> usize {
    // SAFETY: it reads a constant.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("pages have a size")
}
