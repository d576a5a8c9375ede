from fastanila import ops

if ops.INTERPRETED:
    # The interpreter of Triton 3.6 turns loop bounds into ints as numpy 2.4 no longer allows; later ones do as here.
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
