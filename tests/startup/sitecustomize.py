"""What every Python process that a test starts runs first: the collector of cycles looks a hundredth as often.

Such a process lives for seconds, and its objects are modules that stay; the default spends a fifth of their loading on
looking for garbage among them.
"""

import gc

gc.set_threshold(200_000, 50, 100)
