//! The local date and time for templates that print it (`strftime_now`), as Python's
//! `datetime.strftime` writes it.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;

/// Longest result; a longer one is refused.
const MAX_BYTES: usize = 1_024;

/// Formats `seconds` since 1970 in local time, without a time zone. `None` for a time or a format
/// out of range.
pub(crate) fn strftime(format: &str, seconds: f64) -> Option<String> {
    // Python fills in what the C library does not know of a time without a zone.
    let micros = format!("{:06}", (seconds.rem_euclid(1.0) * 1e6) as u32);
    let mut native = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match (c == '%').then(|| chars.next()).flatten() {
            None => native.push(c),
            Some('f') => native.push_str(&micros),
            Some('z' | 'Z') => {}
            Some(directive) => native.extend(['%', directive]),
        }
    }
    if native.is_empty() {
        return Some(native);
    }
    let native = CString::new(native).ok()?;
    let seconds = seconds.floor() as libc::time_t;
    let mut broken_down = MaybeUninit::<libc::tm>::uninit();
    let mut buffer = [0u8; MAX_BYTES];
    // SAFETY: `localtime_r` writes the whole struct unless it returns null, which is checked before
    // the struct is read; `strftime` writes at most `MAX_BYTES` bytes and ends them with a zero
    // unless it returns 0, which is checked too.
    #[allow(unsafe_code)]
    unsafe {
        if libc::localtime_r(&raw const seconds, broken_down.as_mut_ptr()).is_null() {
            return None;
        }
        let written = libc::strftime(buffer.as_mut_ptr().cast(), MAX_BYTES, native.as_ptr(), broken_down.as_ptr());
        if written == 0 {
            return None;
        }
    }
    CStr::from_bytes_until_nul(&buffer).ok()?.to_str().ok().map(str::to_owned)
}
