//! What the processor can do, and functions compiled once for each kind.
//!
//! One wheel serves all processors of an architecture, so the choice is made when the program runs.
//! A [`Level`] can only be had where the processor has its instructions: who holds one may call
//! what was compiled for it.

use std::sync::OnceLock;

/// A set of instructions that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level(Tier);

/// The sets there are code for, from the least to the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier {
    /// What every processor of the architecture has.
    Portable,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 (F, BW, DQ, VL) with VNNI, which multiplies 8-bit numbers.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The best one of this processor.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| *Self::all().last().expect("every processor has the portable one"))
    }

    /// What every processor has.
    pub(super) fn portable() -> Self {
        Self(Tier::Portable)
    }

    /// Those of this processor, from the least to the best.
    pub fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut levels = vec![Self(Tier::Portable)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            levels.push(Self(Tier::Avx2));
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                levels.push(Self(Tier::Avx512));
            }
        }
        levels
    }

    /// The one of this name, if the processor has it.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|level| level.name() == name)
    }

    /// `portable`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Tier::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => "avx512",
        }
    }

    pub(super) fn tier(self) -> Tier {
        self.0
    }
}

/// `fn name(level, ..)` runs `body::<FUSED>(..)` as it was compiled for the level. FUSED: whether
/// multiply-adds round once, for [`multiply_add`]. The body must be `#[inline(always)]`.
macro_rules! by_level {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
        $vis fn $name(level: $crate::cpu::level::Level, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }
                match level.tier() {
                    // SAFETY: a `Level` can only be had where the processor has its instructions.
                    $crate::cpu::level::Tier::Avx512 => unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::level::Tier::Avx2 => unsafe { avx2($($arg),*) },
                    $crate::cpu::level::Tier::Portable => $body::<false>($($arg),*),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = level;
                $body::<false>($($arg),*)
            }
        }
    };
}
pub(super) use by_level;

/// a * b + c. FUSED: in one instruction, which only some processors have.
#[inline(always)]
pub(super) fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}
