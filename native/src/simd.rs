//! One function body, compiled for the baseline and for AVX2, chosen at run time.
//!
//! The bodies are plain loops without intrinsics and without fused multiply-add, so both versions give the same bits;
//! the tests hold them against each other.

/// Defines `name` (dispatches), whose body is the `#[inline(always)]` function `body`.
macro_rules! dispatched {
    ($(#[$doc:meta])* $vis:vis fn $name:ident = $body:ident ( $($arg:ident : $ty:ty),* $(,)? ) $(-> $ret:ty)?) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn with_avx2($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: this CPU has AVX2, as just asked; the function has no other precondition.
                    return unsafe { with_avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

pub(crate) use dispatched;
