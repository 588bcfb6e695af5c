// Before anything is drawn: the colours chosen last time, and the mark that scripts run.
document.documentElement.classList.add("js");
try {
  const theme = localStorage.getItem("curvscope-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* a browser that keeps nothing for files still shows the page */ }
