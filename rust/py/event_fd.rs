//! The descriptor by which an event loop learns that there is news.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use pyo3::PyResult;

/// Linux's eventfd: a counter that is readable while it is not zero.
pub(super) struct EventFd(OwnedFd);

#[allow(unsafe_code)] // The three system calls have no safe wrapper in std.
impl EventFd {
    pub(super) fn new() -> PyResult<Self> {
        // SAFETY: no pointers; a non-negative result is a descriptor that nobody else owns.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: as above.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes it readable. A counter that is full is readable, so that failure is none.
    pub(super) fn set(&self) {
        let one = 1u64;
        // SAFETY: the kernel reads the 8 bytes of `one`.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Makes it unreadable. One that is not readable fails with EAGAIN and stays so.
    pub(super) fn clear(&self) {
        let mut count = 0u64;
        // SAFETY: the kernel writes 8 bytes into `count`.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }

    /// The descriptor, which stays ours.
    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
