//! Memory for weights: in pages of 2 MB where the kernel gives them. With pages of 4 KB every sixtieth line of a
//! weight waits for an address; many small matrices share a piece of memory, so that they have large pages too.

use std::alloc::{alloc_zeroed, dealloc, handle_alloc_error, Layout};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::raw::Writer;

/// Where a part begins: at a line of the cache, and a vector of 64 bytes.
const LINE: usize = 64;
/// A large page.
const PAGE: usize = 2 << 20;
/// What parts share.
const SHARED: usize = 32 << 20;
/// Parts from this size on share memory; smaller ones gain nothing, and what is read behind them is found.
const LEAST: usize = 64 << 10;

/// The last region that is shared, and where its next part begins.
static CURRENT: Mutex<(Weak<Region>, usize)> = Mutex::new((Weak::new(), 0));

/// Bytes that begin at a line of the cache; zeros at first.
#[derive(Debug)]
pub struct Memory {
    region: Arc<Region>,
    start: usize,
    len: usize,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Memory {
    /// So many bytes.
    pub fn new(len: usize) -> Self {
        if !(LEAST..=SHARED / 2).contains(&len) {
            return Self { region: Arc::new(Region::new(len)), start: 0, len };
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (region, start) = match current.0.upgrade() {
            Some(region) if current.1 + len <= SHARED => (region, current.1),
            _ => (Arc::new(Region::new(SHARED)), 0),
        };
        *current = (Arc::downgrade(&region), (start + len).next_multiple_of(LINE));
        Self { region, start, len }
    }

    /// All of them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: this part of the region is this memory's alone, and it was zeros at first.
        unsafe { std::slice::from_raw_parts(self.region.start.as_ptr().add(self.start), self.len) }
    }

    /// All of them, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and nobody else has this memory.
        unsafe { std::slice::from_raw_parts_mut(self.region.start.as_ptr().add(self.start), self.len) }
    }

    /// To be written by several threads.
    pub fn writer(&mut self) -> Writer<'_, u8> {
        Writer::new(self.bytes_mut())
    }
}

/// What the allocator gave.
#[derive(Debug)]
struct Region {
    allocated: NonNull<u8>,
    layout: Layout,
    /// The first byte that is used.
    start: NonNull<u8>,
}

// SAFETY: it is a `Box<[u8]>` whose parts `Memory` gives to one owner each.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Zeros: no page is there before it is written, so that it can be a large one.
    fn new(len: usize) -> Self {
        let alignment = if len >= PAGE { PAGE } else { LINE };
        // Asked for with no alignment, since the allocator writes the zeros itself where there is one.
        let layout = Layout::from_size_align(len + alignment, 1).expect("less than memory has");
        // SAFETY: the layout has a size.
        let allocated = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: so far the memory reaches.
        let start = unsafe { allocated.add(allocated.as_ptr().align_offset(alignment)) };
        if alignment == PAGE {
            wish_for_large_pages(start, len / PAGE * PAGE);
        }
        Self { allocated, layout, start }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: from `alloc_zeroed` with this layout.
        unsafe { dealloc(self.allocated.as_ptr(), self.layout) };
    }
}

#[cfg(target_os = "linux")]
fn wish_for_large_pages(start: NonNull<u8>, len: usize) {
    extern "C" {
        fn madvise(start: *mut std::ffi::c_void, len: usize, advice: std::ffi::c_int) -> std::ffi::c_int;
    }
    const MADV_HUGEPAGE: std::ffi::c_int = 14;
    // SAFETY: whole pages of memory that is this process's; what they hold does not change. A kernel that has no
    // large pages says so, and small ones serve.
    unsafe { madvise(start.as_ptr().cast(), len, MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn wish_for_large_pages(_: NonNull<u8>, _: usize) {}
